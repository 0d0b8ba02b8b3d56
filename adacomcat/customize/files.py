"""Adapters as files: safetensors of our own, and the list of tensors that ComCAT's script pickles.

A file names each factor ATTENTION.KIND-OF-TOKENS.FACTOR. Its header has the ranks, the token of the
prompts, and the base model with a checksum of the attentions' weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adacomcat.customize.adapter import Linear
from adacomcat.customize.adapters import (
    DEFAULT,
    adapters_of,
    attentions,
    denoiser,
    install,
    require_rank,
    set_alpha,
    unload_,
)
from adacomcat.customize.places import adapts_queries, heads_of, projections_of
from adacomcat.customize.vit import classifier_of
from adacomcat.errors import UserError, reason
from adacomcat.layers.linear import LowRankLinear
from adacomcat.utils.checksum import checksum
from adacomcat.utils.files import atomic_file, make_folder
from adacomcat.utils.model import class_count

FORMAT, HEADER = "adacomcat-adapters-1", "adacomcat"
CLASSIFIER = "classifier:"  # in front of its weights'


class AdapterFile(NamedTuple):
    """What the header of a file says."""

    token: str | None  # the word of the prompts that calls the adapter
    base: str  # the name of the model that it was trained beside
    base_checksum: str
    alpha: float  # to use it with


def base_checksum(target: Any) -> str:
    """The checksum of the frozen projections of all attentions, in half precision.

    A model that was stored in half precision has the same one in single precision.
    """
    return checksum({f"{place}.{tokens}.{name}{factor}": weight.detach().half()
                     for place, attention in attentions(target).items()
                     for tokens, frozen in projections_of(attention).items()
                     for name, linear in frozen._asdict().items() if linear is not None
                     for factor, weight in _weights(linear).items()})


def _weights(linear: Linear) -> dict[str, Tensor]:
    """What a projection holds: one weight, or two factors, whose product would be rounded."""
    if isinstance(linear, LowRankLinear):
        return {".v": linear.v, ".u": linear.u}
    return {"": linear.weight}


def base_name(target: Any) -> str:
    """The hub's name of the model, or the last part of its folder's path."""
    for found in (target, denoiser(target)):
        name = getattr(getattr(found, "config", None), "_name_or_path", None)
        if name:
            return Path(name).name if Path(name).exists() else str(name)
    return type(denoiser(target)).__name__


def save_adapters(target: Any, path: str | Path, name: str = DEFAULT, *, half: bool = False,
                  token: str | None = None, alpha: float = 1.0) -> Path:
    """Write the adapter ``name`` of a model; of a ViT its classifier, too.

    Args:
        target: a pipeline or module with the adapter.
        path: of the file, ending in .safetensors; folders above it are made.
        name: of the adapter.
        half: write float16, half as many bytes.
        token: the word of the prompts that calls what was learnt.
        alpha: to use the adapter with.

    Raises:
        UserError: there is no such adapter, or the file cannot be written.
    """
    path = Path(path)
    tensors = {f"{place}.{key}": factor.detach().cpu().to(torch.float16 if half else factor.dtype)
               for place, adapter in adapters_of(target, name).items()
               for key, factor in adapter.named_parameters()}
    tensors |= _classifier(target)
    header = {"format": FORMAT, "token": token, "base": base_name(target),
              "base_checksum": base_checksum(target), "alpha": float(alpha),
              "ranks": sorted({a.rank for a in adapters_of(target, name).values()})}
    # One entry: safetensors orders several by chance, and equal adapters are to be equal files.
    metadata = {HEADER: json.dumps(header, allow_nan=False)}
    try:
        make_folder(path.parent)
        with atomic_file(path, durable=True) as scratch:
            save_file(tensors, scratch, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the adapters {path}: {reason(error)}") from error
    return path


def load_adapters(target: Any, path: str | Path, name: str = DEFAULT, *, rank: int | None = None,
                  verify: bool = True) -> AdapterFile:
    """Put the adapters of a file beside the attentions of a model, with the file's α.

    A ViT gets the file's classifier, with its number of classes.

    Args:
        target: a pipeline or module that computes what the base of the file computes.
        path: of a file that ``save_adapters`` wrote.
        name: to know the adapter by; a model can have several.
        rank: refuse another one.
        verify: refuse a base with other weights.

    Raises:
        UserError: the file cannot be read, or does not fit the model.
    """
    tensors, header = _read(Path(path))
    found = AdapterFile(*(header[name] for name in AdapterFile._fields))
    if verify and found.base_checksum != base_checksum(target):
        raise UserError(f"{path} was made beside {found.base}, and this model has other weights; "
                        "load that one, or pass verify=False (--no-verify)")
    if rank is not None and header["ranks"] != [rank]:
        raise UserError(f"{path} has the rank {', '.join(map(str, header['ranks']))}, not {rank}")
    head = {key.removeprefix(CLASSIFIER): tensors.pop(key) for key in list(tensors)
            if key.startswith(CLASSIFIER)}
    put(target, tensors, name, str(path))
    if head:
        _set_classifier_(target, head, name, str(path))
    set_alpha(target, {name: found.alpha})
    return found


def _classifier(target: Any) -> dict[str, Tensor]:
    """The classifier of a ViT, by the names in a file; nothing where there is none."""
    head = classifier_of(denoiser(target))
    return {} if head is None else {f"{CLASSIFIER}{key}": value.detach().cpu().contiguous()
                                    for key, value in head.state_dict().items()}


def _set_classifier_(target: Any, weights: Mapping[str, Tensor], name: str, source: str) -> None:
    """Give a ViT a classifier of these weights, with as many classes; else no adapter ``name``."""
    model: Any = denoiser(target)
    try:
        if "weight" in weights and len(weights["weight"]) != class_count(model):
            like = next(model.parameters())
            model.reset_classifier(len(weights["weight"]))
            model.get_classifier().to(like.device, like.dtype)
        model.get_classifier().load_state_dict(dict(weights))
    except (AttributeError, RuntimeError) as error:
        unload_(target, name)
        raise UserError(f"{source} has a classifier that does not fit this model: "
                        f"{reason(error)}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The factors and the header."""
    if not path.is_file():
        raise UserError(f"there is no adapters file {path}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read the adapters {path}: {reason(error)}") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{path} holds no adapters of this program; from_lora reads diffusers' "
                        "LoRA, and load_comcat the lists of ComCAT's script")
    return tensors, header


def put(target: Any, tensors: Mapping[str, Tensor], name: str, source: str) -> None:
    """Install an adapter and copy ``tensors``, by the names of our files, into it.

    Raises:
        UserError: they do not fit the model, which stays as it is.
    """
    places = attentions(target)
    ranks: dict[str, int] = {}
    for key, tensor in tensors.items():
        place, _, factor = key.rpartition(".")
        place = place.rpartition(".")[0]
        if place not in places:
            raise UserError(f"{source} adapts {place or key}, which is no attention of this model")
        if factor == "v":
            ranks[place] = len(tensor) // heads_of(places[place])
    if not ranks or min(ranks.values()) < 1:
        raise UserError(f"{source} has no factor of rank 1 or more")
    install(target, ranks, name)
    factors = {f"{place}.{key}": factor for place, adapter in adapters_of(target, name).items()
               for key, factor in adapter.named_parameters()}
    wrong = sorted(factors.keys() ^ tensors.keys()) or sorted(
        key for key, factor in factors.items() if factor.shape != tensors[key].shape)
    if wrong:
        unload_(target, name)
        raise UserError(f"{source} does not fit the model: {wrong[0]} is missing, unexpected or of "
                        "another shape")
    with torch.no_grad():
        for key, factor in factors.items():
            factor.copy_(tensors[key])


def load_comcat(target: Any, path: str | Path, rank: int, name: str = DEFAULT) -> None:
    """Read the file of ComCAT's script: a pickled list of q, k, v and o of each attention.

    Its order is that of the script: attentions of the down blocks, of the up blocks, of the middle.
    It is read with ``weights_only=True``.

    Args:
        target: a pipeline with a U-Net, or the U-Net.
        path: of the file.
        rank: that it was trained with; the file does not tell.
        name: to know the adapter by.

    Raises:
        UserError: the file cannot be read, or does not fit the model at this rank.
    """
    require_rank(rank)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises nearly anything
        raise UserError(f"cannot read the adapters {path}: {reason(error)}") from error
    places = [place for part in ("down", "up", "mid") for place, attention in
              attentions(target).items() if place.startswith(part) and adapts_queries(attention)]
    if not isinstance(found, list) or len(found) != 4 * len(places) \
            or not all(isinstance(tensor, Tensor) and tensor.ndim == 2 for tensor in found):
        raise UserError(f"{path} is no list of {4 * len(places)} matrices, four for each attention")
    heads = {place: heads_of(attentions(target)[place]) for place in places}
    tensors = {f"{place}.tokens.{factor}": found[4 * at + part].detach()
               for at, place in enumerate(places) for part, factor in enumerate("qkvo")}
    other = next((len(tensors[f"{place}.tokens.v"]) // count for place, count in heads.items()
                  if len(tensors[f"{place}.tokens.v"]) != rank * count), None)
    if other is not None:
        raise UserError(f"{path} has the rank {other}, not {rank}")
    put(target, tensors, name, str(path))
