"""One HTML page for a compression or training run, which needs no network to be read."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from adacomcat.plan import RankPlan
from adacomcat.report.tables import LABELS, Comparison
from adacomcat.sites import Site
from adacomcat.utils.files import atomic_write_text


def write_report(folder: str | Path, title: str, comparison: Comparison, sites: Sequence[Site],
                 plan: RankPlan, history: Sequence[Mapping[str, float]] = ()) -> Path:
    """Write report.html: the models' measures, a heat map of ranks, curves over epochs.

    Args:
        folder: where the page goes; it exists.
        title: the page's title.
        comparison: the measures of the models.
        sites: the sites that the plan decides; without any there is no heat map.
        plan: the ranks.
        history: a mapping for each epoch, with 'epoch' and measures like 'loss' or 'top1'.

    Returns:
        The path of the page.
    """
    pictures = {"Ranks, as a part of the full rank": _rank_map(sites, plan)} if sites else {}
    if history:
        pictures["History"] = _curves(history)
    page = jinja2.Template(_PAGE, autoescape=True).render(
        title=title, style=STYLE, columns=comparison.columns(), rows=comparison.cells(),
        pictures=pictures, ranks=[(site.name, plan[site.name], site.full_rank) for site in sites])
    path = Path(folder) / "report.html"
    # A path in the title may hold bytes that are no UTF-8.
    atomic_write_text(path, page.encode("utf-8", "replace").decode("utf-8"), durable=True)
    return path


def _rank_map(sites: Sequence[Site], plan: RankPlan) -> str:
    """The PNG of a heat map: blocks as rows, kinds of sites as columns, rank ÷ full rank as colour.

    A dense site has the colour of the full rank.
    """
    import numpy as np
    cells = {_position(site.name): site for site in sites}
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    image = np.full((len(rows), len(columns)), np.nan)
    axes = subplots(1.5 + 0.7 * len(columns), 1.0 + 0.3 * len(rows)).flat[0]
    for (row, column), site in cells.items():
        rank = plan[site.name]
        y, x = rows.index(row), columns.index(column)
        image[y, x] = 1.0 if isinstance(rank, str) else rank / site.full_rank
        axes.text(x, y, rank, ha="center", va="center", fontsize=7,
                  color="white" if image[y, x] > 0.6 else "black")
    axes.imshow(image, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    return png(axes)


def _position(name: str) -> tuple[str, str]:
    """'blocks.3.mlp.fc1' → ('blocks.3', 'mlp.fc1')."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[:last + 1]) or "model", ".".join(parts[last + 1:])


def _curves(history: Sequence[Mapping[str, float]]) -> str:
    """The PNG of one curve for each measure, over epochs."""
    from matplotlib.ticker import MaxNLocator
    names = [name for name in LABELS if any(name in row for row in history)]
    axes = subplots(7, 2.2 * len(names), count=len(names))
    for name, axis in zip(names, axes.flat, strict=True):
        points = [(row.get("epoch", at), row[name]) for at, row in enumerate(history)
                  if name in row]
        axis.plot(*zip(*points, strict=True), marker=".")
        axis.set(ylabel=LABELS[name][0], xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return png(axes.flat[0])


def subplots(width: float, height: float, count: int = 1) -> Any:
    """``count`` axes one below the other, as an array (count, 1); sizes in inches."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained").subplots(count, squeeze=False)


def png(axes: Any) -> str:
    """The figure of ``axes`` in base64."""
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse } th, td { padding: .2rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
img { max-width: 100% }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>{{ style }}</style></head><body>
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
