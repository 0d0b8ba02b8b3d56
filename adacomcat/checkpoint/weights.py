"""State dicts: reading them from a file and loading them into a model."""

import argparse
import re
import urllib.parse
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from timm.models._hub import download_cached_file
from torch import Tensor, nn

from adacomcat.errors import UserError, reason

StateDict = dict[str, Tensor]

# Where training scripts put the weights that they evaluate, the averaged ones first: timm, DeiT
# and ComCAT, DINO.
_PLACES = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
SECURE = "https://"  # how addresses begin
# The part of a checksum that torch.hub's files carry in their names.
_CHECKSUM = re.compile(r"-[0-9a-f]{8,}\.")

# How a file begins that people mistake for weights → what it is, and the mend.
_MISTAKEN = (
    (rb"version https://git-lfs", "a Git LFS pointer; fetch the weights with git lfs pull"),
    (rb"\s*<(!doctype|html|\?xml|head)", "a web page; download the file itself"),
    (rb"\x1f\x8b\x08|BZh[1-9]|\xfd7zXZ", "compressed; unpack it first"),
    (rb"\s*[{\[]\s*[\"{\[][^\0]{4}", "JSON; give the file of the weights"),
    (rb"\Z", "empty; copy it again"),
)


def read_weights(path: str | Path) -> StateDict:
    """The state dict of a .safetensors file, or of a pickle, read with ``weights_only=True``.

    In a pickle it may stand under 'state_dict_ema', 'model_ema', 'state_dict', 'model' or
    'teacher', beside the ``argparse.Namespace`` of the scripts of timm, DeiT, DINO and ComCAT. An
    object of any other class is refused by its name, and nothing of it is executed.

    Args:
        path: a file, or an https address, which is downloaded into torch.hub's cache.

    Raises:
        UserError: there is no such file, or no state dict of plain tensors in it.
    """
    path = _local(path)
    start = _first_bytes(path)
    try:
        if start[8:9] == b"{" or (path.suffix == ".safetensors" and start[:2] != b"PK"):
            return load_file(path)
        found = _unpickled(path)
    except Exception as error:  # whatever a damaged file makes its reader stumble over
        raise UserError(_unreadable(path, error)) from error
    for key in _PLACES:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not any(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} holds no state dict")
    _require_plain_tensors(path, found)
    return clean_state_dict(found)


def _local(path: str | Path) -> Path:
    """The file itself; that of an address in the cache of torch.hub, where it need not wait."""
    address = str(path)
    if not address.startswith(SECURE):
        return Path(path)
    name = Path(urllib.parse.urlparse(address).path).name
    try:
        return Path(download_cached_file(address, check_hash=bool(_CHECKSUM.search(name))))
    except Exception as error:  # of the network, of the disk, of a checksum that differs
        raise UserError(f"cannot download {address:.200}: {reason(error)}; download it yourself "
                        "and name the file") from error


def _first_bytes(path: Path) -> bytes:
    """The first bytes of a file, unless they tell that it is something else than weights."""
    try:
        if not path.is_file():
            raise UserError(f"there is no weights file {path}")
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for pattern, what in _MISTAKEN:
        if re.match(pattern, start, re.IGNORECASE):
            raise UserError(f"{path} holds no weights: it is {what}")
    return start


def _unpickled(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # a few kilobytes may unpack to terabytes
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError("its parts are larger than the file")
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    with path.open("rb") as file, warnings.catch_warnings(), allowed:
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


def _unreadable(path: Path, error: Exception) -> str:
    wanted = re.search(r"Unsupported global: GLOBAL (\S+)|unsupported GLOBAL (\S+)", str(error))
    if wanted:
        return (f"{path} holds an object of {wanted[1] or wanted[2]}, which only running code "
                "could read; save its state_dict() alone, where you trust it")
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return f"{path} is truncated or no weights file: {reason.splitlines()[0]:.200}"


def _require_plain_tensors(path: Path, found: Mapping[Any, Any]) -> None:
    """Refuse names that are no words, and what is no dense tensor within the file's size."""
    size = path.stat().st_size
    for name, value in found.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: {name!r:.40} is no name of a tensor; save a state_dict()")
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__} and no tensor; save a "
                            "state_dict()")
        if value.layout != torch.strided or value.is_quantized or value.is_meta \
                or value.numel() * value.element_size() > size:
            raise UserError(f"{path}: {name} is no plain tensor of the file; save "
                            "dense tensors that are neither quantised nor expanded")


def load_weights_(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load ``weights`` into ``model``.

    Args:
        model: gets the weights in place.
        weights: a tensor for every name of the model's state dict.
        source: what the error calls the weights.

    Raises:
        UserError: names what is missing, unexpected, of another shape or of another kind of
            number; the model is unchanged.
    """
    require_fit(model, weights, source)
    model.load_state_dict(weights)


def require_fit(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """The check of ``load_weights_`` alone; a model on the meta device serves too."""
    wanted = model.state_dict()
    common = [(name, weights[name], tensor) for name, tensor in wanted.items() if name in weights]
    problems = [f"{what}: {_some(names)}" for what, names in (
        ("missing", [name for name in wanted if name not in weights]),
        ("unexpected", [name for name in weights if name not in wanted]),
        ("of another shape", [f"{name} {tuple(given.shape)} instead of {tuple(tensor.shape)}"
                              for name, given, tensor in common if given.shape != tensor.shape]),
        ("of another kind", [f"{name} {_kind(given)} instead of {_kind(tensor)}"
                             for name, given, tensor in common if _kind(given) != _kind(tensor)]),
    ) if names]
    if problems:
        raise UserError(f"{source} does not fit the model; {'; '.join(problems)}")


def _kind(tensor: Tensor) -> str:
    """The kind of its numbers; between kinds a copy would round or lose a part."""
    if tensor.dtype == torch.int8:
        return "int8"
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "whole"


def _some(names: list[str], shown: int = 4) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
