"""Charts as inline SVG, 360 units wide, so that a phone shows them in their own size.

Colours are classes of the page's style sheet. Every mark that stands for a number carries its
place in the run's files.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from adacomcat.report.values import Node

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40


def tag(name: str, *children: object, **attributes: Any) -> Markup:
    """An element; of an attribute's name '_' becomes '-', and None leaves it out."""
    pairs = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
                    for key, value in attributes.items() if value is not None)
    inside = Markup("").join(escape(child) for child in children)
    return Markup(f"<{name}{pairs}>") + inside + Markup(f"</{name}>")


@dataclass
class Mark:
    """One point: where it is, what it stands for, and the words that name it.

    ``x`` and ``y`` are nodes of numbers. ``kind`` is a class of the style sheet.
    """

    x: Node
    y: Node
    label: str
    kind: str = ""
    ring: bool = False
    name: Node | None = None  # written beside the point


@dataclass
class Line:
    """Points that are joined; ``marks`` says whether they are drawn, too."""

    points: list[Mark]
    kind: str = ""
    marks: bool = True


@dataclass
class Chart:
    """A chart of lines and marks over two axes.

    Args:
        title: what it shows; with ``summary`` it is the chart's alternative text.
        x, y: the axes' labels.
        summary: what the chart says, in words.
        lines: what is drawn.
        forms: how the numbers of both axes are written, as in ``values.FORMS``.
        log_x: a logarithmic axis.
    """

    title: str
    x: str
    y: str
    summary: str = ""
    lines: list[Line] = field(default_factory=list)
    forms: tuple[str, str] = ("general", "general")
    log_x: bool = False

    def draw(self) -> Markup:
        """The SVG element; nothing where there is no point."""
        marks = [mark for line in self.lines for mark in line.points]
        if not marks:
            return Markup("")
        x = _Axis([m.x.value for m in marks], LEFT, WIDTH - RIGHT, self.log_x)
        y = _Axis([m.y.value for m in marks], HEIGHT - BOTTOM, TOP)
        shapes = [shape for line in self.lines for shape in self._shapes(line, x, y)]
        parts = [*_grid(x, y), *shapes,
                 tag("text", self.x, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="axis",
                     text_anchor="middle"),
                 tag("text", self.y, x=4, y=10, class_="axis")]
        label = f"{self.title}. {self.summary}".strip()
        return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label,
                   class_="chart")

    def _shapes(self, line: Line, x: "_Axis", y: "_Axis") -> Iterable[Markup]:
        places = [(x.place(mark.x.value), y.place(mark.y.value)) for mark in line.points]
        if len(places) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            yield tag("polyline", points=path, class_=f"line {line.kind}".strip())
        if not line.marks:
            return
        for mark, (a, b) in zip(line.points, places, strict=True):
            yield _point(mark, a, b, self.forms)


def _point(mark: Mark, a: float, b: float, forms: tuple[str, str]) -> Markup:
    words = f"{mark.label}: {mark.x.text(forms[0])}, {mark.y.text(forms[1])}"
    shapes = [tag("circle", tag("title", words), cx=f"{a:.1f}", cy=f"{b:.1f}", r=4,
                  class_=f"mark {mark.kind}".strip(), **_place(mark))]
    if mark.ring:
        shapes.append(tag("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=9, class_="ring"))
    if mark.name is not None:
        right = a > WIDTH * 0.6
        shapes.append(tag("text", mark.name.text(), x=f"{a + (-8 if right else 8):.1f}",
                          y=f"{b - 7:.1f}", class_="name",
                          text_anchor="end" if right else "start", data_at=mark.name.at))
    return Markup("").join(shapes)


def _place(mark: Mark) -> dict[str, Any]:
    return {"data_x": mark.x.at, "data_y": mark.y.at, "data_x_value": mark.x.value,
            "data_y_value": mark.y.value}


class _Axis:
    """Values → places between two ends of an axis, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float,
                 log: bool = False) -> None:
        self.log = log and min(values) > 0
        low, high = min(values), max(values)
        if self.log:
            low, high = math.log10(low), math.log10(high)
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        floor = 0.0 if low >= 0 and not self.log else -math.inf
        self.low, self.high = max(floor, low - room), high + room
        self.start, self.end = start, end

    def place(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            every = [step * 10.0 ** power for power in decades for step in (1, 2, 5)]
            return [tick for tick in every if self.low <= math.log10(tick) <= self.high]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        for factor in (1, 2, 5, 10):
            if (self.high - self.low) / (step * factor) <= 5:
                step *= factor
                break
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step) + 1)]


def _grid(x: _Axis, y: _Axis) -> Iterable[Markup]:
    """Lines and numbers of the axes, which are no results and hidden from readers of the page."""
    shapes = []
    for tick in y.ticks():
        at = f"{y.place(tick):.1f}"
        shapes += [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"),
                   tag("text", short(tick), x=LEFT - 6, y=at, dy="0.32em", class_="tick",
                       text_anchor="end")]
    for tick in x.ticks():
        at = f"{x.place(tick):.1f}"
        shapes += [tag("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"),
                   tag("text", short(tick), x=at, y=HEIGHT - BOTTOM + 15, class_="tick",
                       text_anchor="middle")]
    return [tag("g", *shapes, aria_hidden="true")]


def short(value: float) -> str:
    """A tick's number: 0.25, 15, 2k, 1.5M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.3g}" if value else "0"


@dataclass
class Cell:
    """One cell of a heat map: a node that is written, its share of the strongest, its words."""

    row: str
    column: str
    node: Node
    form: str
    share: float
    label: str
    hatched: bool = False


CELL_HEIGHT, NAMES = 22, 82


def heat_map(title: str, cells: Sequence[Cell], summary: str, cell_width: int = 46) -> Markup:
    """Rows × columns; a cell is stronger the larger its share is, and hatched where it is dense."""
    rows = list(dict.fromkeys(cell.row for cell in cells))
    columns = list(dict.fromkeys(cell.column for cell in cells))
    width, height = NAMES + cell_width * len(columns), 22 + CELL_HEIGHT * len(rows)
    shapes = [_HATCH, *(tag("text", name, x=NAMES + cell_width * (at + 0.5), y=14, class_="tick",
                            text_anchor="middle") for at, name in enumerate(columns)),
              *(tag("text", name, x=NAMES - 8, y=22 + CELL_HEIGHT * (at + 0.5), dy="0.32em",
                    class_="tick", text_anchor="end") for at, name in enumerate(rows))]
    for cell in cells:
        x = NAMES + cell_width * columns.index(cell.column)
        y = 22 + CELL_HEIGHT * rows.index(cell.row)
        box: dict[str, Any] = {"x": x + 1, "y": y + 1, "width": cell_width - 2,
                               "height": CELL_HEIGHT - 2}
        shade = f"--share: {5 + 45 * min(1.0, max(0.0, cell.share)):.0f}%"
        shapes.append(tag("g", tag("title", cell.label), tag("rect", **box, class_="cell",
                                                             style=shade),
                          tag("rect", **box, fill="url(#hatch)") if cell.hatched else "",
                          tag("text", cell.node.text(cell.form), x=x + cell_width / 2,
                              y=y + CELL_HEIGHT / 2, dy="0.34em", text_anchor="middle",
                              class_="in", **_data(cell.node, cell.form))))
    return tag("svg", *shapes, viewBox=f"0 0 {width} {height}", role="img",
               aria_label=f"{title}. {summary}", class_="map",
               style=f"width: {width}px")


def _data(node: Node, form: str) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in node.attributes(form).items()}


_HATCH = Markup('<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
                'patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="6" class="hatch">'
                '</line></pattern></defs>')
