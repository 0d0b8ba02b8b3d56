"""Progress bars on a terminal, silence elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_shown: list[str] = []  # the label of the bar on the screen, or nothing


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on a terminal; a bar inside another is not shown."""
    if not sys.stderr.isatty() or _shown:
        return iter(items)
    return _track(items, label, total)


def _track(items: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import track
    _shown.append(label)
    try:
        yield from track(items, description=label, total=total, console=Console(stderr=True),
                         transient=True)
    finally:
        _shown.remove(label)
