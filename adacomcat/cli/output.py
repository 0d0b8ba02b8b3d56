"""stdout and stderr as they are: with an encoding of their own, and a reader that may leave."""

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator

from adacomcat.errors import UserError

PLAIN = {"→": "->", "×": "x", "·": "*", "…": "...", "–": "-", "█": "#"} | dict.fromkeys(
    "▏▎▍▌▋▊▉", "") | dict(zip("▁▂▃▄▅▆▇", "1234567", strict=True))


def _spell_out(error: UnicodeError) -> tuple[str | bytes, int]:
    """ASCII for what an encoding does not have: the symbols of our tables, else an escape."""
    assert isinstance(error, UnicodeEncodeError)
    symbols = [PLAIN.get(symbol) for symbol in error.object[error.start:error.end]]
    if None in symbols:
        return codecs.backslashreplace_errors(error)
    return "".join(map(str, symbols)), error.end


codecs.register_error("adacomcat.spell_out", _spell_out)


def tolerate_encodings() -> None:
    """Print in ASCII wherever the encoding of stdout or stderr is not UTF, as of a Windows pipe."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            unicode = codecs.lookup(stream.encoding).name.startswith("utf")
            stream.reconfigure(encoding=None if unicode else "ascii", errors="adacomcat.spell_out")


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Inside, whoever reads stdout may close it, as `head` does: the work is done all the same.

    Raises:
        UserError: stdout cannot be written for another reason, like a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_rest()
    except OSError as error:
        _discard_rest()
        raise UserError(f"cannot print the result: {error.strerror or error}") from error


def _discard_rest() -> None:
    """What is left in the buffer goes nowhere, instead of failing when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
