"""Median seconds of several ways to compute the same, in turn: with CUDA graphs, or on a CPU."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

REPEATS, CALLS = 9, 5

Ways = Mapping[str, Callable[[], object]]  # label → a call that computes the same


def on_gpu() -> bool:
    """Whether new tensors go to a GPU; without one everything is a dry run."""
    return torch.get_default_device().type == "cuda"


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def interleaved(ways: Ways, calls: int = CALLS) -> dict[str, float]:
    """Median seconds of one call of each way; a graph captures ``calls`` calls."""
    if not on_gpu():
        return in_turn(ways)
    graphs = {name: _captured(run, calls) for name, run in ways.items()}
    return _median({name: _replayed(graph, calls) for name, graph in graphs.items()}, REPEATS)


def in_turn(ways: Ways) -> dict[str, float]:
    """Median seconds of one call of each way, without graphs."""
    return _median({name: partial(first_call, run) for name, run in ways.items()},
                   REPEATS if on_gpu() else 2)


def first_call(run: Callable[[], object]) -> float:
    """Seconds of a call, its compilation and its search for tiles included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def _median(clocks: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(repeats):
        for name, clock in clocks.items():
            times[name].append(clock())
    return {name: statistics.median(found) for name, found in times.items()}


def _captured(run: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph, calls: int) -> Callable[[], float]:
    def clock() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls

    return clock
