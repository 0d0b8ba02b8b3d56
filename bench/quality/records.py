"""Measurements on disk: JSON, from which an interrupted run goes on, and Markdown tables."""

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import paths  # noqa: F401  (makes machine importable)
import torch
from machine import machine

from adacomcat.errors import UserError
from adacomcat.utils.files import atomic_write_text

Record = dict[str, Any]


class Records:
    """Key → the measurements of a run. Finished runs stay in the file and are not repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else "{}"
            self.found: dict[str, Any] = json.loads(text)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the finished runs of {path}: {error}; "
                            "move that file away") from error

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The run's measurements; ``make()`` runs it where the file does not have them."""
        if key not in self.found:
            self.found[key] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.path, json.dumps(self.found, indent=1, allow_nan=False))
        return self.found[key]


def mean_and_deviation(values: Iterable[float]) -> str:
    """'mean ± sample standard deviation'; the mean alone for one value."""
    values = list(values)
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def provenance() -> str:
    """A line with the command, date, machine and versions, to stand above a table."""
    here = machine()
    script = Path(sys.argv[0])
    command = shlex.join(["python", f"bench/quality/{script.name}", *sys.argv[1:]])
    return (f"`{command}`, {date.today()}; {here['cpu']}, {torch.get_num_threads()} threads; "
            f"torch {here['torch']}, timm {here['timm']}.\n")


def command(main: Callable[[], None]) -> None:
    """Run a script; a ``UserError`` becomes one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        sys.exit(2)
