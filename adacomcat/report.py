"""Tables on the terminal, and one offline HTML page per run."""

import base64
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, Site

_LABELS = {
    "params": ("parameters", "{:,.0f}"), "macs": ("MACs per image", "{:,.0f}"),
    "top1": ("top-1 %", "{:.2f}"), "loss": ("loss", "{:.4f}"),
    "test_loss": ("test loss", "{:.4f}"),
    "latency_ms": ("latency, ms", "{:.2f}"), "images_per_second": ("images/s", "{:,.1f}"),
}


@dataclass(frozen=True)
class Comparison:
    """Model → measure → value; the first model is what the others are compared with."""

    rows: dict[str, dict[str, float]]

    def columns(self) -> list[str]:
        measures = self._measures()
        return ["", *(_LABELS.get(m, (m, ""))[0] for m in measures), "parameters kept"]

    def cells(self) -> list[list[str]]:
        first = next(iter(self.rows.values()))["params"]
        return [[name, *(self._cell(row, m) for m in self._measures()),
                 f"{row['params'] / first:.3f}"] for name, row in self.rows.items()]

    def _measures(self) -> list[str]:
        return list(dict.fromkeys(measure for row in self.rows.values() for measure in row))

    @staticmethod
    def _cell(row: dict[str, float], measure: str) -> str:
        if measure not in row:
            return ""
        return _LABELS.get(measure, ("", "{:g}"))[1].format(row[measure])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Whole lines, however narrow the pipe."""
    width = None if sys.stdout.isatty() else 240
    table = Table(title=title, title_justify="left", box=SIMPLE,
                  show_header=any(columns), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or not column else "right",
                         no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    Console(width=width, highlight=False).print(table)


def print_comparison(title: str, comparison: Comparison) -> None:
    print_table(title, comparison.columns(), comparison.cells())


def print_refinement(found: Mapping[str, Any] | None) -> None:
    """What ``Refined.summary`` says; nothing where no plan was refined."""
    if found is None:
        return
    result = (f"refined: loss on held-out images {found['start_loss']:.4f} → {found['loss']:.4f}, "
              f"{found['tried']} plans tried")
    if not found["changed"]:
        print(f"{result}; the first one stays")
        return
    print(result)
    print_table("", ["site", "before", "after"],
                [[name, *ranks] for name, ranks in found["changed"].items()])


def write_report(folder: str | Path, title: str, comparison: Comparison, sites: Sequence[Site],
                 plan: RankPlan, history: Sequence[Mapping[str, float]] = ()) -> Path:
    """report.html in ``folder``: models before and after, ranks as a heat map, the history.

    history: one mapping per epoch, with 'epoch', and 'loss' or 'top1'
    """
    pictures = {"Ranks, as a part of the full rank": _rank_map(sites, plan)} if sites else {}
    if history:
        pictures["History"] = _curves(history)
    page = jinja2.Template(_PAGE, autoescape=True).render(
        title=title, columns=comparison.columns(), rows=comparison.cells(), pictures=pictures,
        ranks=[(site.name, plan[site.name], site.full_rank) for site in sites])
    path = Path(folder) / "report.html"
    scratch = path.with_suffix(".partial")
    scratch.write_text(page)
    os.replace(scratch, path)
    return path


def _rank_map(sites: Sequence[Site], plan: RankPlan) -> str:
    """Blocks down, kinds of sites across; a dense site counts as 1."""
    import numpy as np
    cells = {_position(site.name): site for site in sites}
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    image = np.full((len(rows), len(columns)), np.nan)
    axes = _axes(1.5 + 0.7 * len(columns), 1.0 + 0.3 * len(rows)).flat[0]
    for (row, column), site in cells.items():
        rank = plan[site.name]
        y, x = rows.index(row), columns.index(column)
        image[y, x] = 1.0 if rank == DENSE else rank / site.full_rank
        axes.text(x, y, rank, ha="center", va="center", fontsize=7,
                  color="white" if image[y, x] > 0.6 else "black")
    axes.imshow(image, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    return _png(axes)


def _position(name: str) -> tuple[str, str]:
    """'blocks.3.mlp.fc1' → ('blocks.3', 'mlp.fc1')."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[:last + 1]) or "model", ".".join(parts[last + 1:])


def _curves(history: Sequence[Mapping[str, float]]) -> str:
    from matplotlib.ticker import MaxNLocator
    names = [name for name in _LABELS if any(name in row for row in history)]
    axes = _axes(7, 2.2 * len(names), count=len(names))
    for name, axis in zip(names, axes.flat, strict=True):
        points = [(row.get("epoch", at), row[name]) for at, row in enumerate(history)
                  if name in row]
        axis.plot(*zip(*points, strict=True), marker=".")
        axis.set(ylabel=_LABELS[name][0], xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _png(axes.flat[0])


def _axes(width: float, height: float, count: int = 1) -> Any:
    """``count`` axes under each other, as an array."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained").subplots(count, squeeze=False)


def _png(axes: Any) -> str:
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse } th, td { padding: .2rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
img { max-width: 100% }
</style></head><body>
<h1>{{ title }}</h1>
<table><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for name, picture in pictures.items() %}<h2>{{ name }}</h2>
<img alt="{{ name }}" src="data:image/png;base64,{{ picture }}">
{% endfor %}
<details><summary>Ranks</summary><table><tr><th>site</th><th>rank</th><th>full rank</th></tr>
{% for row in ranks %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></details>
</body></html>
"""
