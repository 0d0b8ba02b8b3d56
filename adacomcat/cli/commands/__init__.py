"""One module per command: ``run(args)`` does the work and returns an ``Outcome``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    Args:
        data: what ``--json`` prints.
        show: prints the same for people.
        code: the exit code.
    """

    data: dict[str, Any]
    show: Callable[[], None]
    code: int = 0
