"""What a training run says while it goes: events, who gets them, and the pace.

An event is a dict with 'event': 'start', 'step', 'search', 'epoch' or 'end'. Searches and epochs
are the records of ``Trainer.searches`` and ``Trainer.history``.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from adacomcat.errors import UserError

Event = dict[str, Any]
Observer = Callable[[Event], None]
Item = TypeVar("Item")

MEMORY = 0.9  # part of the pace that is kept at each step: it forgets over some ten steps


class Pace:
    """Images a second, the share of the time that waits for data, and the seconds that are left.

    Args:
        batch: images of a step.
        total: steps of the whole run.
        clock: seconds; tests have their own.
    """

    def __init__(self, batch: int, total: int,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self.batch, self.total, self.clock = batch, total, clock
        self.step_seconds = self.wait_seconds = 0.0

    def watched(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches; between two of them lies a step."""
        iterator = iter(batches)
        while True:
            start = self.clock()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            waited = self.clock() - start
            yield batch
            self._note(self.clock() - start, waited)

    def _note(self, step: float, waited: float) -> None:
        keep = MEMORY if self.step_seconds else 0.0
        self.step_seconds = keep * self.step_seconds + (1 - keep) * step
        self.wait_seconds = keep * self.wait_seconds + (1 - keep) * waited

    def report(self, done: int) -> dict[str, float]:
        """The pace behind ``done`` steps of the run; nothing before the first one is timed."""
        if not self.step_seconds:
            return {}
        return {"images_per_second": self.batch / self.step_seconds,
                "data_wait": self.wait_seconds / self.step_seconds,
                "eta_seconds": (self.total - done) * self.step_seconds}


class JsonLines:
    """Appends each event to a file, one JSON object a line, with the 'time' in Unix seconds.

    A full disk does not end the run: lines that cannot be written are lost.

    Args:
        path: the file; its folder exists.
        every: seconds between two 'step' events that are written.
    """

    def __init__(self, path: str | Path, every: float = 0.0) -> None:
        self.path, self.every, self.last = Path(path), every, -1e9

    def __call__(self, event: Event) -> None:
        now = time.time()
        if event["event"] == "step":
            if now - self.last < self.every:
                return
            self.last = now
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event | {"time": now}) + "\n")


class TensorBoard:
    """Scalars for TensorBoard: of steps, epochs and searches.

    Raises:
        UserError: the package tensorboard is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs the package tensorboard: pip install "
                            "tensorboard") from error
        self.writer = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        for name, value in event.items():
            if isinstance(value, int | float) and name not in ("epoch", "at", "step"):
                self.writer.add_scalar(f"{kind}/{name}", value, event.get("at", event.get("epoch")))
        if kind == "end":
            self.writer.close()


def together(observers: Iterable[Observer]) -> Observer:
    """One observer that hands each event to all."""
    every = list(observers)

    def tell(event: Event) -> None:
        for observer in every:
            observer(event)
    return tell


def read_events(path: str | Path) -> list[Event]:
    """The events in a file of ``JsonLines``; a line that is being written is left out."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [event for event in found if isinstance(event, dict) and "event" in event]
