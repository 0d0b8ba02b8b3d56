"""Types of flags: what the text behind a flag means, or why it means nothing.

This module imports neither torch nor timm, so that --help answers at once.
"""

import argparse
import os
import re
from collections.abc import Callable

from adacomcat.utils.limits import FRACTION, Limit


def number(limit: Limit) -> Callable[[str], float]:
    """The type of a flag whose value is within ``limit``."""
    def within(text: str) -> float:
        try:
            return limit.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {limit}; got {_short(text)}") from error
    return within


def number_or(word: str, limit: Limit) -> Callable[[str], float]:
    """The type of a flag that is a number within ``limit``, or ``word``, which stands for 0."""
    return lambda text: 0 if text.lower() == word else number(limit)(text)


def numbers(limit: Limit) -> Callable[[str], list[float]]:
    """The type of a flag of several such numbers, with commas in between."""
    return lambda text: [number(limit)(part.strip()) for part in text.split(",")]


def path(text: str) -> str:
    """The name of a file or folder; it may begin with ~."""
    try:
        found = os.path.expanduser(text)
        if not text or "\0" in text or (found == text and text.startswith("~")):
            raise ValueError
        return found
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a path; got {_short(text)}") from error


def _short(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:40]!r} and {len(text) - 40} more characters"


def pattern(text: str) -> str | re.Pattern[str]:
    """A glob, or behind 're:' a regular expression."""
    expression = text.removeprefix("re:")
    try:
        return text if expression == text else re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"must be a glob, or re: and a regular expression; {_short(expression)} is none: "
            f"{error}") from error


def keeps(text: str) -> tuple[float, ...]:
    """Fractions: '0.9:0.3:7' are seven from 0.9 to 0.3 in equal steps, '0.9,0.5' just these."""
    try:
        if ":" in text:
            first, last, count = text.split(":")
            ends, steps = (FRACTION.parse(first), FRACTION.parse(last)), int(count) - 1
            if not 1 <= steps < 1000:
                raise ValueError
            found = [ends[0] + (ends[1] - ends[0]) * at / steps for at in range(steps + 1)]
        else:
            found = [FRACTION.parse(part) for part in text.split(",")]
        return tuple(dict.fromkeys(round(keep, 6) for keep in found))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            "must be fractions like 0.9,0.5, or FIRST:LAST:COUNT like 0.9:0.3:7; got "
            f"{_short(text)}") from error


def key_value(text: str) -> tuple[str, str]:
    """(key, value) from 'key=value'."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, like depth=6; got {text!r:.60}")
    return key, value
