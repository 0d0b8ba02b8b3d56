"""State dicts: reading them from a file and loading them into a model."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from adacomcat.errors import UserError

StateDict = dict[str, Tensor]


def read_weights(path: str | Path) -> StateDict:
    """The state dict of a .safetensors file, or of a pickle, read with ``weights_only=True``.

    In a pickle it may stand under 'state_dict_ema', 'model_ema', 'state_dict' or 'model'.

    Raises:
        UserError: there is no such file, or no state dict in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError,
            KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is truncated or no weights file: {reason}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not any(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} holds no state dict")
    return clean_state_dict(found)


def load_weights_(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load ``weights`` into ``model``.

    Args:
        model: gets the weights in place.
        weights: a tensor for every name of the model's state dict.
        source: what the error calls the weights.

    Raises:
        UserError: names what is missing, unexpected or of another shape; the model is unchanged.
    """
    wanted = model.state_dict()
    differing = [f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
                 for name, tensor in wanted.items()
                 if name in weights and weights[name].shape != tensor.shape]
    problems = [f"{what}: {_some(names)}" for what, names in (
        ("missing", [name for name in wanted if name not in weights]),
        ("unexpected", [name for name in weights if name not in wanted]),
        ("of another shape", differing)) if names]
    if problems:
        raise UserError(f"{source} does not fit the model; {'; '.join(problems)}")
    model.load_state_dict(weights)


def _some(names: list[str], shown: int = 4) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
