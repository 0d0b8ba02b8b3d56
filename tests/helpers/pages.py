"""The documents that users read, and the code blocks in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
GUIDES = (README, *sorted(DOCS.rglob("*.md")))
PROSE = (*GUIDES, CONTRIBUTING, *sorted(ROOT.glob("examples/*/README.md")))

_BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)\n"
                    r"(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of its first line of code
    reason: str | None  # why it is not run, from a comment above it


def blocks(page: Path, *languages: str) -> list[Block]:
    """The code blocks of a page in these languages, in order."""
    text = page.read_text()
    return [Block(found["language"], found["text"],
                  text.count("\n", 0, found.start("text")) + 1, found["reason"])
            for found in _BLOCK.finditer(text) if found["language"] in languages]


def commands(block: Block) -> list[list[str]]:
    """The words of each line of a shell block."""
    return [shlex.split(line) for line in block.text.strip().splitlines()]


def adacomcat_arguments(words: list[str]) -> list[str] | None:
    """What adacomcat gets to see in a command line; None where it is not called."""
    if words[0] == "torchrun":
        at = words.index("adacomcat")
        assert words[at - 1] == "-m"
        return words[at + 1:]
    if words[0] == "adacomcat-torchrun":
        return words[next(at for at, word in enumerate(words[1:], 1) if word[0] != "-"):]
    return words[1:] if words[0] == "adacomcat" else None


def all_commands(*pages: Path) -> Iterator[list[str]]:
    for page in pages:
        for block in blocks(page, "bash"):
            yield from commands(block)
