"""Reads a report page: which numbers stand on it, and where each says that it comes from."""

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "img", "br", "line", "rect", "circle", "polyline"}
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass
class Element:
    name: str
    attributes: dict[str, str]
    text: str = ""
    above: list["Element"] = field(default_factory=list)

    def inside(self, **wanted: str) -> bool:
        """Whether it, or what it stands in, has such an attribute."""
        return any(element.attributes.get(key.replace("_", "-")) == value
                   for element in (self, *self.above) for key, value in wanted.items())


class Page(HTMLParser):
    """All elements with their own text, of a page whose elements are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.problems: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.problems += [f"<{element.name}> is not closed" for element in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attrs}, above=list(self.open))
        self.elements.append(element)
        if tag not in VOID or f"</{tag}>" in self.source[:0]:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open[-1].name != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")
            return
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1].text += data


def at(place: str, folders: list[Path]) -> Any:
    """What stands at 'RUN:FILE#/POINTER'; with '@key' behind it the last key itself."""
    place, _, key = place.partition("@")
    number, _, rest = place.partition(":")
    name, _, pointer = rest.partition("#")
    value = json.loads((folders[int(number)] / name).read_text(encoding="utf-8"))
    parts = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    for part in parts:
        value = value[int(part)] if isinstance(value, list) else value[part]
    return parts[-1] if key else value


def number(text: str) -> tuple[float, float]:
    """(value, half of its last digit) that a text means: '22.1 M', '+0.50', '49.8%', '2.04×'."""
    found = re.fullmatch(r"([+-]?[\d,]+(?:\.(\d+))?(?:e([+-]\d+))?)\s?([kMGT]?)B?([%×]?)", text)
    assert found, f"{text!r} is no number"
    unit = UNITS[found[4]] * 10.0 ** int(found[3] or 0)
    mantissa = float(found[1].replace(",", "").partition("e")[0])
    return mantissa * unit, 0.5001 * 10.0 ** -len(found[2] or "") * unit
