"""Progress bars on a terminal, silence elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import track

Item = TypeVar("Item")


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    if not sys.stderr.isatty():
        return iter(items)
    from rich.console import Console
    console = Console(stderr=True)
    return iter(track(items, description=label, total=total, console=console, transient=True))
