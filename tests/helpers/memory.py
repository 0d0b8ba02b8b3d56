"""Memory that tensors take while something runs."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocation_peak(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes of tensors at the peak of a run on this thread, and those of the largest tensor."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, max((event.nbytes() for event in events), default=0)
