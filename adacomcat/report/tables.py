"""Tables on the terminal."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

# measure → (how tables and pages call it, format of its values)
LABELS = {
    "params": ("parameters", "{:,.0f}"), "macs": ("MACs per image", "{:,.0f}"),
    "top1": ("top-1 %", "{:.2f}"), "top5": ("top-5 %", "{:.2f}"), "loss": ("loss", "{:.4f}"),
    "test_loss": ("test loss", "{:.4f}"),
    "bytes": ("bytes", "{:,.0f}"),
    "latency_ms": ("latency, ms", "{:.2f}"), "images_per_second": ("images/s", "{:,.1f}"),
}


@dataclass(frozen=True)
class Comparison:
    """The measures of several models; the share of parameters is relative to the first.

    rows: model → measure → value; 'params' is one of the measures.
    """

    rows: dict[str, dict[str, float]]

    def columns(self) -> list[str]:
        """The header: an empty cell above the models' names, the measures, parameters kept."""
        measures = self._measures()
        return ["", *(LABELS.get(m, (m, ""))[0] for m in measures), "parameters kept"]

    def cells(self) -> list[list[str]]:
        """A row for each model; a measure that it lacks is an empty cell."""
        first = next(iter(self.rows.values()))["params"]
        return [[name, *(self._cell(row, m) for m in self._measures()),
                 f"{row['params'] / first:.3f}"] for name, row in self.rows.items()]

    def _measures(self) -> list[str]:
        return list(dict.fromkeys(measure for row in self.rows.values() for measure in row))

    @staticmethod
    def _cell(row: dict[str, float], measure: str) -> str:
        if measure not in row:
            return ""
        return LABELS.get(measure, ("", "{:g}"))[1].format(row[measure])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; outside a terminal its lines are not folded, however many columns it has."""
    width = None if sys.stdout.isatty() else 240
    table = Table(box=SIMPLE, show_header=any(columns), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or not column else "right",
                         no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    console = Console(width=width, highlight=False)
    with console.capture() as text:
        if title:  # of its own: a narrow table would fold it
            console.print(Text(title, style="italic"))
        console.print(table)
    print(text.get(), end="")


def bar(value: float, most: float, width: int = 16) -> str:
    """A bar of blocks whose length is ``value`` as a part of ``most``."""
    eighths = round(8 * width * value / most) if most > 0 else 0
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def plot(points: Sequence[tuple[float, float, str]], x: str, y: str, width: int = 60,
         height: int = 12) -> str:
    """Points (x, y, letter) on a grid of characters, with the ends of both axes in numbers."""
    ends = [(min(values), max(values)) for values in zip(*((p[0], p[1]) for p in points),
                                                          strict=True)]
    rows = [[" "] * width for _ in range(height)]
    for a, b, letter in points:
        across, up = ((value - low) / ((high - low) or 1.0)
                      for value, (low, high) in zip((a, b), ends, strict=True))
        rows[height - 1 - round(up * (height - 1))][round(across * (width - 1))] = letter
    names = [f"{ends[1][1]:.4g}", *[""] * (height - 2), f"{ends[1][0]:.4g}"]
    lines = [f"{name:>8} |{''.join(row).rstrip()}" for name, row in zip(names, rows, strict=True)]
    low, high = (f"{end:.4g}" for end in ends[0])
    return "\n".join([f"{y}", *lines, " " * 9 + "+" + "-" * width,
                      " " * 10 + low + f"{x}".center(width - len(low) - len(high)) + high])


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print name and value of each fact, one a line, under a title."""
    print_table(title, ["", ""], list(facts.items()))


def print_comparison(title: str, comparison: Comparison) -> None:
    """Print the models' measures as a table."""
    print_table(title, comparison.columns(), comparison.cells())


def print_refinement(found: Mapping[str, Any] | None) -> None:
    """Print what ``Refined.summary`` says: the loss before and after, the ranks that changed.

    None, where no plan was refined, prints nothing.
    """
    if found is None:
        return
    result = (f"refined: loss on held-out images {found['start_loss']:.4f} → {found['loss']:.4f}, "
              f"{found['tried']} plans tried")
    if not found["changed"]:
        print(f"{result}; none is better than the first")
        return
    print(result)
    print_table("", ["site", "before", "after"],
                [[name, *ranks] for name, ranks in found["changed"].items()])
