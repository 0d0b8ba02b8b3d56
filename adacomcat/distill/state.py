"""The state of a training run on disk: tensors, numbers, lists and dicts, in one file.

``Trainer.save`` writes it after every epoch; ``train.run`` reads it to resume.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from adacomcat.errors import UserError
from adacomcat.utils.files import atomic_file

FILE = "training_state.pt"
FORMAT = 1


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Replace the state in ``folder``; whoever reads it finds the previous state or this one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / FILE, durable=True) as scratch, scratch.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)


def has_state(folder: str | Path) -> bool:
    """Whether a run left its state in ``folder``."""
    return (Path(folder) / FILE).is_file()


def load_state(folder: str | Path) -> dict[str, Any]:
    """The state that ``save_state`` wrote to ``folder``.

    Raises:
        UserError: the file cannot be read, or another program wrote it.
    """
    path = Path(folder) / FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read the training state {path}: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no training state of this program")
    return state
