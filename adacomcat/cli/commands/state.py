"""The folder of a training state, for the commands that can resume."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adacomcat.distill.state import FILE, has_state
from adacomcat.errors import UserError
from adacomcat.utils.files import exclusive, make_folder, require_writable
from adacomcat.utils.launch import is_first

LOCK, METRICS = "lock", "metrics.jsonl"  # in the folder of the training state


def require_fresh(state: Path, resume: bool) -> None:
    """Raise a ``UserError`` where an earlier run left its state and nobody asks to go on."""
    require_writable(state / FILE)
    if has_state(state) and not resume:
        raise UserError(f"{state} holds the state of an earlier run; pass --resume to go on with "
                        "it, or remove it")


@contextmanager
def alone(state: Path, output: str) -> Iterator[None]:
    """Inside, no other run writes this output; of several processes the first one looks."""
    if not is_first():
        yield
        return
    make_folder(state)
    with exclusive(state / LOCK, output):
        try:
            yield
        finally:
            with suppress(OSError):
                if set(os.listdir(state)) <= {LOCK, METRICS}:  # there is nothing to resume
                    shutil.rmtree(state)
