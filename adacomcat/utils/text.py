"""Text and JSON from files of others, and JSON that every parser takes.

Text is UTF-8, whatever the machine's encoding is. What cannot be read is a ``UserError``, whoever
raised it.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from adacomcat.errors import UserError

MOST_BYTES = 16 << 20  # of a text file; plans and configurations have some kilobytes


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The text of a file, without a byte order mark.

    Args:
        path: a file, or a pipe.
        most: the bytes that it may have.

    Raises:
        UserError: it cannot be read, is no UTF-8, or has more bytes.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"it has more than {most:,} bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is no UTF-8 text (byte {error.start})") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from error


def parse_json(text: str) -> Any:
    """What ``text`` says.

    Raises:
        ValueError: it is no JSON, which NaN and Infinity are not, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON.

    Raises:
        UserError: a number in it is NaN or infinite; the message says which.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except ValueError as error:
        name = next(_not_finite(value, ""), "a value").strip(".")
        raise UserError(f"{name} is NaN or infinite, which JSON cannot hold") from error


def _not_finite(value: Any, name: str) -> Iterator[str]:
    """The places of such numbers in dicts, lists and tuples, like 'models.dense.loss'."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name
    inside = value.items() if isinstance(value, dict) else \
        enumerate(value) if isinstance(value, list | tuple) else ()
    for key, entry in inside:
        yield from _not_finite(entry, f"{name}.{key}")
