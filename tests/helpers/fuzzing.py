"""Random inputs within limits of time and memory, and what may come of them.

FUZZ_EXAMPLES is the number of inputs of each test, FUZZ_SEED decides them.
"""

import contextlib
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
from hypothesis import HealthCheck
from hypothesis import strategies as st

from adacomcat import cli
from adacomcat.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS, BYTES = 10, 2 << 30  # that one input may take
SAFETY = 8 << 30  # more address space than that is refused, so that the machine survives

Value = TypeVar("Value")
Test = Callable[..., None]


def fuzzed(share: float = 1.0) -> Callable[[Test], Test]:
    """A seeded property with this share of the number of inputs."""
    def decorate(test: Test) -> Test:
        chosen = hypothesis.settings(max_examples=max(1, int(EXAMPLES * share)), deadline=None,
                                     database=None, suppress_health_check=list(HealthCheck))
        return hypothesis.seed(SEED)(chosen(test))
    return decorate


class TooLong(BaseException):
    """No program catches it by accident."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Fails where the work inside takes too long or too much memory."""
    def ring(*_: object) -> None:
        raise TooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + SAFETY, limits[1]))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is held now
    held = _peak_kilobytes()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    grown = 1024 * (_peak_kilobytes() - held)
    assert grown < BYTES, f"{grown >> 20} MiB"


def _peak_kilobytes() -> int:
    """Since the last reset; that of ``getrusage`` is the process's whole life's."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0])


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def accepted(call: Callable[[], Value]) -> Value | None:
    """What ``call`` gives; None where it refuses the input by one clear line."""
    with limited():
        try:
            return call()
        except UserError as error:
            require_clear(str(error))
            return None


def require_clear(line: str) -> None:
    """One line of moderate length; memory that was asked for in vain is no clear refusal."""
    assert line.strip() and "\n" not in line and len(line) < 1500, line[:3000]
    assert not any(words in line for words in ("allocate memory", "MemoryError")), line


def command(capsys: Any, *argv: str) -> int:
    """The exit code of a command, 0, 2 or 3, after looking at what it says."""
    capsys.readouterr()
    try:
        with limited():
            code = cli.main(list(argv))
    except TooLong as error:
        raise TooLong(f"{error}: {argv}") from None
    _, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("adacomcat: error:")]
    assert code in (0, 2, 3) and len(errors) == (code == 2) and "Traceback" not in err, err[-3000:]
    for line in errors:
        require_clear(line)
    return code


# What inputs are made of

NUMBERS = st.one_of(
    st.sampled_from((0, 1, -1, 2, 3, 7, 8, 16, 48, 224, 10**3, 10**6, 10**9, 10**20, 2**31, 2**63,
                     -2**63, 0.0, 0.5, 1.0, 1.5, 1e-5, 1e-300, 1e300, -0.5)),
    st.integers(), st.floats(allow_nan=True, allow_infinity=True))
WORDS = st.one_of(
    st.sampled_from(("", "x", "off", "on", "true", "~", "none", "nan", "inf", "-inf", "1e400",
                     "50%", "0x10", "1_000", "2001-02-30", "../x", "/dev/zero", "local-dir:.",
                     "a" * 300, "é", "\0", "\udcff", "*a", "&a", "[", "{", "gelu", "avg",
                     "!!python/name:os.system", "9" * 5000)),
    st.text(max_size=20), NUMBERS.map(str))
JSON = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, WORDS.filter(str.isprintable)),
                    lambda inner: st.one_of(
                        st.lists(inner, max_size=4),
                        st.dictionaries(st.text(max_size=8), inner, max_size=4)),
                    max_leaves=12)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with up to four bytes changed, parts cut out, doubled or put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(changed)))
        length = draw(st.sampled_from((1, 2, 4, 8, 64, 1024)))
        kind = draw(st.sampled_from(("change", "cut", "double", "insert", "end")))
        part = bytes(changed[start:start + length])
        if kind == "change" and start < len(changed):
            changed[start] = draw(st.integers(0, 255))
        elif kind == "cut":
            del changed[start:start + length]
        elif kind == "double":
            changed[start:start] = part
        elif kind == "insert":
            changed[start:start] = draw(st.binary(max_size=16))
        elif kind == "end":
            del changed[start:]
    return bytes(changed)


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A tree of dicts and lists in which one or two entries are others, gone or more."""
    for _ in range(draw(st.integers(1, 2))):
        value = _altered_once(draw, value)
    return value


def _altered_once(draw: st.DrawFn, value: Any) -> Any:
    inside = isinstance(value, dict | list) and len(value) > 0
    if not inside or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    if isinstance(value, list):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _altered_once(draw, value[at]), *value[at + 1:]]
    name = draw(st.sampled_from(sorted(value)))
    changed = draw(st.sampled_from(("entry", "entry", "entry", "gone", "more")))
    if changed == "gone":
        return {key: entry for key, entry in value.items() if key != name}
    if changed == "more":
        return value | {draw(st.text(max_size=12)): draw(JSON)}
    return value | {name: _altered_once(draw, value[name])}
