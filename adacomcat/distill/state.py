"""Training state on disk: tensors and plain containers only, written whole or not at all."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from adacomcat.errors import UserError

FILE = "training_state.pt"
FORMAT = 1


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """A reader sees the previous state or this one, also if the process dies in between."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{FILE}.partial"
    with scratch.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, folder / FILE)


def has_state(folder: str | Path) -> bool:
    return (Path(folder) / FILE).is_file()


def load_state(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read the training state {path}: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no training state of this program")
    return state
