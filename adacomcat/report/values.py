"""Every number and name on a page is a ``Node``: a place in one of the run's files.

A node knows its value and where it stands, and says both in the page's HTML, so that a page can be
compared with its files.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from markupsafe import Markup


def _si(value: float) -> str:
    """Three digits and k, M, G or T: 22.1 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}" if abs(value) < 999.5 * size else \
                f"{value / size:,.0f} {unit}"
    return f"{value:g}"


# Form → text of a number.
FORMS: Mapping[str, Callable[[Any], str]] = {
    "count": "{:,.0f}".format, "si": _si, "bytes": lambda value: _si(value) + "B",
    "share": "{:.1%}".format, "percent": "{:.2f}%".format, "points": "{:+.2f}".format,
    "ms": "{:.2f}".format, "seconds": "{:,.0f}".format, "score": "{:.2f}".format,
    "error": "{:.4f}".format, "times": "{:.2f}×".format, "plain": str,
    "general": "{:.4g}".format, "small": "{:.2g}".format,
}


class Node:
    """A value from a file, and its place: 'RUN:FILE#/KEY/INDEX', as in a JSON pointer.

    Args:
        value: what stands there.
        at: the place.
    """

    def __init__(self, value: Any, at: str) -> None:
        self.value, self.at = value, at

    def __getitem__(self, key: str | int) -> "Node":
        name = str(key).replace("~", "~0").replace("/", "~1")
        return Node(self.value[key], f"{self.at}/{name}")

    def __contains__(self, key: object) -> bool:
        return key in self.value

    def __iter__(self) -> Iterator["Node"]:
        """The entries of a list or of a mapping."""
        keys = self.value if isinstance(self.value, Mapping) else range(len(self.value))
        return (self[key] for key in keys)

    def __len__(self) -> int:
        return len(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)

    def get(self, *keys: str | int) -> "Node | None":
        """The node inside, key after key; None where it is missing or null."""
        node: Node = self
        for key in keys:
            if not isinstance(node.value, dict) or node.value.get(key) is None:
                return None
            node = node[key]
        return node

    def items(self) -> Iterator[tuple[str, "Node"]]:
        """(key, node) of a mapping."""
        return ((key, self[key]) for key in self.value)

    def text(self, form: str = "plain") -> str:
        """The value as people read it."""
        return FORMS[form](self.value)

    def show(self, form: str = "plain") -> Markup:
        """The value with its place, as HTML."""
        if isinstance(self.value, int | float) and not isinstance(self.value, bool):
            return Markup('<data value="{}" data-at="{}" data-form="{}">{}</data>').format(
                json.dumps(self.value), self.at, form, self.text(form))
        return Markup('<span data-at="{}">{}</span>').format(self.at, self.text())

    def attributes(self, form: str = "plain") -> dict[str, str]:
        """The same as attributes of an SVG element whose content is ``text(form)``."""
        return {"data-at": self.at, "data-value": json.dumps(self.value), "data-form": form}
