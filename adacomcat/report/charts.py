"""The charts of one run, each drawn from the nodes of its files."""

import itertools
import math
from collections.abc import Callable, Iterable

from markupsafe import Markup

from adacomcat.evaluation.sensitivity import block_of
from adacomcat.report.svg import Cell, Chart, Line, Mark, heat_map
from adacomcat.report.values import Node

COLUMNS = ("qk", "q", "k", "vo", "fc1", "fc2", "hidden")  # in this order, others after them
CURVES = {"loss": "loss", "test_loss": "test loss", "top1": "top-1 %", "lr": "learning rate"}


def column_of(site: str) -> str:
    """'blocks.3.mlp.fc1' → 'fc1'."""
    return site.rpartition(".")[2]


def _in_order(cells: Iterable[Cell]) -> list[Cell]:
    """The columns of ``COLUMNS`` first; rows stay as they are."""
    cells = list(cells)
    known = {name: at for at, name in enumerate(COLUMNS)}
    columns = sorted({cell.column for cell in cells}, key=lambda name: (known.get(name, 99), name))
    rows = {name: at for at, name in enumerate(dict.fromkeys(cell.row for cell in cells))}
    return sorted(cells, key=lambda cell: (columns.index(cell.column), rows[cell.row]))


def rank_map(sites: Node) -> Markup:
    """Blocks × kinds: the rank that is left, as strong as its part of the full rank."""
    cells = [Cell(_row(site), column_of(site["site"].value), site["rank"], "plain",
                  site["share"].value, f"{site['site'].text()}: rank {site['rank'].text()} of "
                  f"{site['full_rank'].text()}", site["rank"].value == "dense") for site in sites]
    if not cells:
        return Markup("")
    dense = sum(cell.hatched for cell in cells)
    return heat_map("Ranks", _in_order(cells), f"{len(cells)} sites, {dense} of them dense")


def _row(site: Node) -> str:
    name = site["site"].value
    block = block_of(name)
    return block if block != name else "others"


def error_curves(run: Node) -> list[Markup]:
    """A chart for each kind of site: relative error over rank, the chosen ranks marked."""
    curves, ranks = run["curves"], {site["site"].value: site for site in run["sites"]}
    charts = []
    by_kind = sorted(curves.value, key=column_of)  # a stable order
    for kind, names in itertools.groupby(by_kind, key=column_of):
        chart = Chart(f"Truncation error of {kind}", "rank, as a part of the full rank",
                      "relative error", forms=("share", "error"))
        chosen = []
        for name in names:
            points = [Mark(point["share"], point["error"], name) for point in curves[name]]
            chart.lines.append(Line(points, "thin", marks=False))
            rank = ranks[name]["rank"].value if name in ranks else "dense"
            chosen += [Mark(point["share"], point["error"], f"{name}, rank {rank}", "small")
                       for point in curves[name] if point["rank"].value == rank]
        chart.summary = f"{len(chart.lines)} sites; {len(chosen)} chosen ranks are marked"
        chart.lines += [Line([mark], "small") for mark in chosen]
        charts.append(chart.draw())
    return charts


def sensitivity_map(sites: Node) -> Markup:
    """Blocks × kinds: the damage of the middle measured rank, on a logarithmic scale."""
    chosen = []
    for site in sites:
        ranks = sorted(site["damage"].value, key=int)
        if ranks:
            chosen.append((site, ranks[(len(ranks) - 1) // 2]))
    logs = [math.log10(max(site["damage"][rank].value, 1e-12)) for site, rank in chosen]
    if not chosen:
        return Markup("")
    low, high = min(logs), max(logs)
    cells = [Cell(_row(site), column_of(site["site"].value), site["damage"][rank], "small",
                  (log - low) / (high - low or 1.0), f"{site['site'].text()} at rank {rank} of "
                  f"{site['full_rank'].text()}: damage {site['damage'][rank].text('error')}")
             for (site, rank), log in zip(chosen, logs, strict=True)]
    worst = max(cells, key=lambda cell: cell.share)
    return heat_map("Damage of single sites", _in_order(cells), f"the worst is {worst.label}",
                    cell_width=62)


def training_curves(run: Node) -> list[Markup]:
    """One chart for each measure over the epochs; epochs that searched are marked."""
    history, charts = run["history"], []
    searched = {search["epoch"].value for search in run.get("searches") or ()}
    for name, label in CURVES.items():
        marks = [Mark(row["epoch"], row[name], f"epoch {row['epoch'].text()}",
                      "searched" if row["epoch"].value in searched else "")
                 for row in history if name in row]
        if marks:
            last = marks[-1].y.text("general")
            charts.append(Chart(label, "epoch", label, f"{last} after the last epoch",
                                [Line(marks)], ("plain", "general")).draw())
    return charts


# x axis of a Pareto chart → (label, form, logarithmic)
COSTS = {"params": ("parameters", "si"), "macs": ("MACs of one image", "si"),
         "bytes": ("bytes of weights", "bytes"), "latency_ms": ("milliseconds", "ms")}


def pareto_charts(front: Node, name_of: Callable[[Node], Node] = lambda point: point["name"]
                  ) -> list[Markup]:
    """Quality over each cost: the curves, the dense model and the landmarks, the knee ringed."""
    quality, label = front["quality"].value, front["quality_label"].text()
    charts = []
    for cost, (words, form) in COSTS.items():
        lines: dict[str, list[Mark]] = {}
        for point in front["points"]:
            if cost not in point or quality not in point:
                continue
            kind = point["kind"].value
            mark = Mark(point[cost], point[quality], name_of(point).text(), kind,
                        ring=point["name"].value == front["knee"].value,
                        name=name_of(point) if kind != "compressed" else None)
            key = f"{kind}/{point['dtype'].value}" if kind == "compressed" else point["name"].value
            lines.setdefault(key, []).append(mark)
        if lines:
            drawn = [Line(sorted(marks, key=lambda mark: mark.x.value), marks[0].kind)
                     for marks in lines.values()]
            charts.append(Chart(f"{label} over {words}", words, label,
                                f"the knee is {front['knee'].text()}", drawn,
                                (form, "general")).draw())
    return charts
