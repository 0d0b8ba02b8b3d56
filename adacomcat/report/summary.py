"""A finished run in thirty lines: what the page shows, for a terminal."""

from pathlib import Path
from typing import Any

from adacomcat.evaluation.sensitivity import block_of
from adacomcat.report.charts import COLUMNS, column_of
from adacomcat.report.page import PAGE, Run
from adacomcat.report.tables import bar, print_table

LEVELS = "▁▂▃▄▅▆▇█"
ROWS = 5  # of searches, blocks and cells


def print_summary(folder: str | Path, cards: bool = True) -> None:
    """Print sizes, ranks, searches, the blocks that hurt, and latency, of what is recorded.

    cards: print the sizes, too; a command that has printed them leaves them out.
    """
    run = Run(folder, 0)
    if cards:
        _cards(run)
    if run.run is not None and run.run["sites"]:
        _ranks(run.run["sites"].value)
    if run.run is not None and run.run.get("searches"):
        _searches(run.run["searches"].value)
    if run.sensitivity is not None:
        _blocks(run.sensitivity["blocks"].value)
    if run.latency is not None and len(run.latency["cells"]) > 1:
        _latency(run.latency["cells"].value)
    page = Path(folder) / PAGE
    if page.is_file():
        print(f"the page: {page}")


def _cards(run: Run) -> None:
    rows = []
    for card in run.cards:
        form, before, interval = card["form"], card.get("before"), card.get("interval")
        kept = card.get("kept")
        note = "" if kept is None else f"{kept.text('share')} kept"
        if interval is not None:
            note = f"{interval[0].text(form)} – {interval[1].text(form)}"
        if card.get("times") is not None:
            note = f"{card['times'].text('times')} as fast"
        rows.append([card["label"], "" if before is None else before.text(form),
                     card["after"].text(form), note])
    title = "" if run.title is None else run.title.text()
    print_table(title, ["", "before", "after", ""], rows)


def _ranks(sites: list[dict[str, Any]]) -> None:
    """A line for each kind of site, a bar for each block: the part of the full rank that is left.

    A full bar is a dense site or full rank.
    """
    lines: dict[str, str] = {}
    for site in sites:
        if block_of(site["site"]) != site["site"]:
            level = LEVELS[min(7, int(8 * site["share"]))]
            name = column_of(site["site"])
            lines[name] = lines.get(name, "") + level
    ordered = [name for name in COLUMNS if name in lines]
    print_table("ranks, from the first block to the last", ["", ""],
                [[name, lines[name]] for name in dict.fromkeys([*ordered, *lines])])


def _searches(searches: list[dict[str, Any]]) -> None:
    print_table(f"{len(searches)} searches, the last ones", [
        "epoch", "F", "τ", "changed", "plan", "seconds"], [
        [row["epoch"], f"{row.get('frequency', 1):.3g}", f"{row['temperature']:.3g}",
         row["changed"], "the old one" if row["rejected"] else "adopted", f"{row['seconds']:.1f}"]
        for row in searches[-ROWS:]])


def _blocks(blocks: dict[str, float]) -> None:
    worst = sorted(blocks.items(), key=lambda entry: -entry[1])[:ROWS]
    print_table("blocks that hurt most", ["block", "damage", ""], [
        [name, f"{damage:.2g}", bar(damage, worst[0][1])] for name, damage in worst])


def _latency(cells: list[dict[str, Any]]) -> None:
    names = [name for name in ("dense", "compressed", "optimized") if name in cells[0]]
    print_table("milliseconds", ["batch", "dtype", *names, "speed"], [
        [cell["batch"], cell["dtype"], *(f"{cell[name]:.2f}" for name in names),
         f"{cell['speedup']:.2f}×" if "speedup" in cell else ""] for cell in cells[:ROWS]])
