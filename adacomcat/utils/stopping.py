"""Signals that ask a run to stop: it goes on to a place where it can save, and ends there.

Slurm and machines that are rented by the hour send SIGTERM or SIGUSR1 a while before they kill.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1")
                if name in signal.Signals.__members__)
_asked: list[signal.Signals] = []  # the signal that asked, or nothing


class Stopped(Exception):
    """A run ended early because a signal asked it to.

    Args:
        asked: the signal; on a process that only heard of it from another one, SIGTERM.
        where: how far the run came.
    """

    def __init__(self, asked: signal.Signals, where: str) -> None:
        super().__init__(f"stopped by {asked.name} at {where}")
        self.asked = asked

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + self.asked


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Inside, a signal of ``SIGNALS`` is noted for ``asked_to_stop``; a second one ends at once.

    Only the main thread can set this up; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop() -> signal.Signals | None:
    """The signal that asked this process to stop; None where none did."""
    return _asked[0] if _asked else None


def _note(number: int, frame: FrameType | None) -> None:
    if _asked:
        raise KeyboardInterrupt
    _asked.append(signal.Signals(number))
