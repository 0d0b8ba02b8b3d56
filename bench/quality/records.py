"""Measured numbers on disk: JSON that an interrupted run goes on from, and Markdown tables."""

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import paths  # noqa: F401  (makes the next two importable)
import torch
from compare import write
from machine import machine

from adacomcat.errors import UserError

Record = dict[str, Any]


class Records:
    """Key → what one run measured. Finished runs are kept in the file and never made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the finished runs of {path}: {error}; "
                            "move that file away") from error

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.found:
            self.found[key] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write(self.path, json.dumps(self.found, indent=1))
        return self.found[key]


def mean_and_deviation(values: Iterable[float]) -> str:
    """Over seeds; sample standard deviation."""
    values = list(values)
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def provenance() -> str:
    """Command, date, machine and versions, for the head of a table."""
    here = machine()
    script = Path(sys.argv[0])
    command = shlex.join(["python", f"bench/quality/{script.name}", *sys.argv[1:]])
    return (f"`{command}`, {date.today()}; {here['cpu']}, {torch.get_num_threads()} threads; "
            f"torch {here['torch']}, timm {here['timm']}.\n")


def command(main: Callable[[], None]) -> None:
    """Runs a script; what the user got wrong is one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        sys.exit(2)
