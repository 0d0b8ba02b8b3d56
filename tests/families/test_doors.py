"""Every door at every step, as the table of docs/families.md tells it."""

import doors
import generate_docs
import pytest
from helpers.pages import DOCS

PACKAGES = {"transformers": "transformers", "open_clip": "open_clip"}


def lines() -> dict[str, tuple[str, ...]]:
    """Model → its cells in the page."""
    text = generate_docs.region((DOCS / "families.md").read_text(), "doors")
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|"))
             for line in text.splitlines()[2:]]
    return {line[1].strip("`"): line for line in cells}


@pytest.mark.parametrize("name", doors.DOORS)
def test_a_door_is_as_open_as_the_page_says(name: str) -> None:
    pytest.importorskip(PACKAGES.get(doors.DOORS[name].library, "torch"))
    assert doors.row(name, doors.tried(name)) == lines()[name]


def test_the_page_tells_of_every_door() -> None:
    assert list(lines()) == list(doors.DOORS)
    assert not any({"no", "differs"} & set(line) for line in lines().values())
