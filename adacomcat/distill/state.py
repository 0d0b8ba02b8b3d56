"""The state of a training run on disk: tensors, numbers, lists and dicts, in one file.

``Trainer.save`` writes it; ``train.run`` reads it to resume. The file carries a checksum of its
content, and a reader finds the state that was written last as a whole.
"""

import copy
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adacomcat.errors import UserError, reason
from adacomcat.utils.checksum import checksum
from adacomcat.utils.files import atomic_file, make_folder

FILE = "training_state.pt"
FORMAT = 2


class StateWriter:
    """Writes states to a folder in a thread of its own, one after the other.

    Args:
        folder: where the state goes; it is made where it is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.written = time.monotonic()  # when the latest state was handed over
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="training-state")
        self._latest: Future[None] | None = None
        self._copy: Any = None  # of the state before; the next one goes into its memory

    def write(self, state: dict[str, Any]) -> None:
        """Copy ``state`` and write the copy while the caller goes on.

        Raises:
            UserError: the state before could not be written.
        """
        self.finish()
        self._copy = _snapshot(state, self._copy)
        self._latest = self._thread.submit(save_state, self.folder, self._copy)
        self.written = time.monotonic()

    def is_due(self, seconds: float) -> bool:
        """Whether the latest state was handed over more than ``seconds`` ago."""
        return time.monotonic() - self.written > seconds

    def finish(self) -> None:
        """Wait until the latest state is on the disk.

        Raises:
            UserError: it could not be written.
        """
        if self._latest is not None:
            latest, self._latest = self._latest, None
            latest.result()


def _snapshot(value: Any, before: Any = None) -> Any:
    """A copy that later steps do not change, on the CPU.

    It takes the memory of ``before``, an earlier copy, where that has the same tensors: fresh pages
    cost several times what copying does.
    """
    if isinstance(value, Tensor):
        if (isinstance(before, Tensor) and before.shape == value.shape
                and before.dtype == value.dtype):
            return before.copy_(value.detach())
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        known = before if isinstance(before, Mapping) else {}
        return {key: _snapshot(item, known.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        pairs = zip_longest(value, before[:len(value)] if isinstance(before, list | tuple) else ())
        return type(value)(_snapshot(*pair) for pair in pairs)
    return copy.copy(value)


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Replace the state in ``folder``; whoever reads it finds the previous state or this one.

    Raises:
        UserError: it cannot be written; the previous state stays.
    """
    path = Path(folder) / FILE
    whole = {"format": FORMAT, **state}
    try:
        make_folder(path.parent)
        with atomic_file(path, durable=True) as scratch, scratch.open("wb") as file:
            torch.save(whole | {"checksum": checksum(whole)}, file)
    except (OSError, RuntimeError) as error:
        # Where a disk is full torch stumbles once more while it closes the file.
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write the training state {path}: {reason(first)}; the state "
                        "before it stays, and --resume goes on from there") from error


def has_state(folder: str | Path) -> bool:
    """Whether a run left its state in ``folder``."""
    return (Path(folder) / FILE).is_file()


def load_state(folder: str | Path) -> dict[str, Any]:
    """The state that ``save_state`` wrote to ``folder``.

    Raises:
        UserError: the file cannot be read, is damaged, or another program or version wrote it.
    """
    path = Path(folder) / FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        raise UserError(f"cannot read the training state {path}: {reason(error)}; remove it and "
                        "begin anew") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no training state of this version; remove it and begin anew")
    if checksum({key: item for key, item in state.items() if key != "checksum"}) \
            != state.get("checksum"):
        raise UserError(f"the training state {path} is damaged: its checksum differs; remove it "
                        "and begin anew")
    return state


def require_same_settings(ours: dict[str, object], theirs: dict[str, object]) -> None:
    """Raise a ``UserError`` that names the settings in which a run differs from its state."""
    differing = sorted(name for name in ours if ours[name] != theirs.get(name))
    if differing:
        raise UserError("cannot resume: the training state was made with other settings for "
                        + ", ".join(f"{name} ({theirs.get(name)!r}, now {ours[name]!r})"
                                    for name in differing))


def require_same_inputs(ours: dict[str, str], theirs: dict[str, str]) -> None:
    """Raise a ``UserError`` that names the inputs, by checksums, that a run began without."""
    differing = sorted(name for name in ours.keys() | theirs.keys()
                       if ours.get(name) != theirs.get(name))
    if differing:
        raise UserError("cannot resume: the run began with another "
                        + " and another ".join(differing)
                        + "; give the same again, or remove the state and begin anew")
