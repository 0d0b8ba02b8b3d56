"""Progress bars on a terminal, silence elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_shown: list[str] = []  # labels of the bar on the screen: there is room for one


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """A bar inside another stays silent."""
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
