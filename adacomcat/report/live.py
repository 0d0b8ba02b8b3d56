"""A training run on a terminal: one bar at the bottom, searches and epochs as lines above it.

Elsewhere nothing is drawn; the lines come from the package's logger all the same.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from adacomcat.distill.metrics import Event, Observer
from adacomcat.utils.launch import is_first
from adacomcat.utils.progress import one_bar


@contextmanager
def live_view() -> Iterator[Observer | None]:
    """An observer for ``train.run`` that draws; None where stderr is no terminal."""
    if not (sys.stderr.isatty() and is_first()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=None),
                   TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[pace]}"),
                   console=Console(stderr=True), transient=True, expand=True)
    task = bar.add_task("calibrating", total=None, pace="")
    run = {"epochs": 0, "steps": 0}

    def observe(event: Event) -> None:
        if event["event"] == "start":
            run.update(epochs=event["epochs"], steps=event["steps"])
            bar.update(task, total=event["epochs"] * event["steps"], description="training")
        elif event["event"] == "step":
            bar.update(task, completed=event["at"], pace=pace(event),
                       description=f"epoch {event['epoch']}/{run['epochs']}")

    with one_bar("training"), bar:
        yield observe


def pace(event: Event) -> str:
    """'loss 0.302  1,204 img/s  wait 3%  ETA 0:01:20' of a step's event."""
    words = [f"loss {event['loss']:.3f}"]
    if "images_per_second" in event:
        words += [f"{event['images_per_second']:,.0f} img/s", f"wait {event['data_wait']:.0%}",
                  f"ETA {timedelta(seconds=round(event['eta_seconds']))}"]
    return "  ".join(words)
