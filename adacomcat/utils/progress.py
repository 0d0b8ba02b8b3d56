"""Progress bars on a terminal, silence elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
_shown: list[str] = []  # the label of the bar on the screen, or nothing


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on a terminal; a bar inside another is not shown."""
    if not sys.stderr.isatty() or _shown:
        return iter(items)
    return _track(items, label, total)


@contextmanager
def one_bar(label: str) -> Iterator[None]:
    """Inside, only the caller's own bar is on the screen."""
    _shown.append(label)
    try:
        yield
    finally:
        _shown.remove(label)


def _track(items: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import track
    with one_bar(label):
        yield from track(items, description=label, total=total, console=Console(stderr=True),
                         transient=True)
