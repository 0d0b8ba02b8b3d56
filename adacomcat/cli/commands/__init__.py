"""One module per command: ``run(args)`` does the work and returns an ``Outcome``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What ``--json`` prints, how to show it otherwise, and the exit code."""

    data: dict[str, Any]
    show: Callable[[], None]
    code: int = 0
