"""What images tell of a model, kept: a budget after it takes seconds, and the images no more.

    calibrate(model, images)            one dense pass; error curves, nested factors, sensitivities
    compress(model, calibration=…)      a plan at any budget; the factors cut to it, or the blocks
                                        fitted in sequence to the images that the calibration keeps
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adacomcat.allocation.survey import Survey, survey
from adacomcat.convert.calibrate import KeptImages, calibration_batches
from adacomcat.convert.factors import SiteFactors, require_finite_model
from adacomcat.convert.quantized import require_not_quantized
from adacomcat.errors import UserError
from adacomcat.factorize.factors import (
    LinearFactors,
    ScoreFactors,
    ValueFactors,
)
from adacomcat.factorize.nested import NestedNeurons
from adacomcat.factorize.neurons import NeuronFactors
from adacomcat.layers.registry import mlp_parts
from adacomcat.plan import HIDDEN
from adacomcat.sites import Filters, Site, find_sites, prunable_mlps
from adacomcat.utils.checksum import checksum
from adacomcat.utils.files import atomic_file, require_writable
from adacomcat.utils.inputs import Batch, Inputs, joined
from adacomcat.utils.model import unwrapped

FORMAT = "1"
# What stands in a file → its class; every field is a tensor.
_KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in (
    LinearFactors, ScoreFactors, ValueFactors, NeuronFactors, NestedNeurons)}


@dataclass(frozen=True)
class Calibration(KeptImages):
    """What images told of a model. ``calibrate`` and ``load`` make it, ``compress`` takes it.

    Args:
        weights: the checksum of the dense model's weights: it holds for no others.
        known: error curves, nested factors and probes of every site.
        batches: the images, where they were kept; with them blocks can be fitted in sequence.
    """

    weights: str
    known: Survey
    batches: list[Inputs] | None = None

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file, whole or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        require_writable(path)
        tensors = {f"{name}|{field}": _stored(field, tensor.detach().cpu())
                   for name, found in self.known.factors.items()
                   for field, tensor in _fields(found).items()}
        kinds = {name: type(found).__name__ for name, found in self.known.factors.items()}
        about = {"format": FORMAT, "weights": self.weights, "kinds": kinds,
                 "changes": self.known.changes, "in_sequence": self.known.in_sequence,
                 "batches": [len(batch) for batch in self.batches or ()]}
        if self.batches:
            images = joined(self.batches)
            kept = {"": images} if isinstance(images, Tensor) else images.tensors
            tensors |= {f"images{name}": tensor.detach().cpu().contiguous()
                        for name, tensor in kept.items()}
            if isinstance(images, Batch):
                about["arguments"] = {"places": len(images.args), "values": {
                    name: None if isinstance(value, Tensor) else value
                    for name, value in images.named.items()}}
        try:
            with atomic_file(path, durable=True) as scratch:
                save_file(tensors, scratch, metadata={"adacomcat": json.dumps(about)})
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """What ``save`` wrote, on the CPU.

        Raises:
            UserError: there is no such file, it is damaged, or it is no calibration.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["adacomcat"])
                if about["format"] != FORMAT:
                    raise KeyError("format")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            factors = {name: _made(_KINDS[kind], name, tensors)
                       for name, kind in about["kinds"].items()}
            known = Survey(factors, about["changes"], about["in_sequence"])
            batches = _images(about, tensors)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the calibration {path}: {error}") from error
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is no calibration, or one of another version; make it anew "
                            "with adacomcat calibrate") from error
        return cls(about["weights"], known, batches)

    def require_of(self, model: nn.Module) -> None:
        """
        Raises:
            UserError: ``model`` has other weights than those that were calibrated.
        """
        if weights_checksum(model) != self.weights:
            raise UserError("this calibration belongs to other weights than the model has; "
                            "calibrate this model")

    def require_sites(self, sites: list[Site]) -> None:
        """
        Raises:
            UserError: it does not know one of ``sites``, since filters asked for others.
        """
        for site in sites:
            if site.name not in self.known.factors:
                raise UserError(f"this calibration does not know {site.name}; calibrate with the "
                                "include and exclude of this compression")

    def images_for(self, model: nn.Module) -> list[Inputs] | None:
        """The kept images on the device of ``model``."""
        return None if self.batches is None else [
            batch.to(next(model.parameters()).device) for batch in self.batches]

    def factors_for(self, model: nn.Module) -> Mapping[str, SiteFactors]:
        """The factors, to be cut to a plan while ``model`` is dense."""
        return _Factors(self.known.factors, model)


def _images(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Inputs] | None:
    """The batches that ``Calibration.save`` was given."""
    if not about["batches"]:
        return None
    if "arguments" not in about:
        return list(tensors["images"].split(about["batches"]))
    places = about["arguments"]["places"]
    values = {name: tensors.get(f"images{name}", value)
              for name, value in about["arguments"]["values"].items()}
    whole = Batch(tuple(values.pop(str(place)) for place in range(places)), values)
    ends = list(accumulate(about["batches"]))
    return [whole[end - count:end] for end, count in zip(ends, about["batches"], strict=True)]


def calibrate(model: nn.Module, images: Tensor | Iterable, *, keep_images: bool = True,
              include: Filters | None = None, exclude: Filters | None = None) -> Calibration:
    """What ``images`` tell of ``model``, to compress it to any number of budgets.

    Args:
        model: the dense model; it stays as it is.
        images: as the ``calibration`` of ``compress``.
        keep_images: keep the images, so that ``compress`` fits blocks in sequence. Its result is
            then that of ``compress(model, calibration=images)``, bit for bit. Without them it cuts
            the nested factors, which takes seconds and loses more.
        include: the sites that may be compressed, as for ``compress``.
        exclude: the sites that stay dense.

    Raises:
        UserError: a weight or an image is not finite, or a filter names what the model does not
            have.
    """
    model = unwrapped(model)
    require_not_quantized(model, "calibrate")
    require_finite_model(model)
    batches = calibration_batches(images, model, "images")
    sites = find_sites(model, prunable_mlps(model), include, exclude)
    known = survey(model, sites, batches, _nested)
    return Calibration(weights_checksum(model), known, batches if keep_images else None)


def weights_checksum(model: nn.Module) -> str:
    """Of all parameters and buffers that a state dict has."""
    return checksum(dict(sorted(model.state_dict().items())))


def _nested(factors: SiteFactors) -> SiteFactors:
    """What a calibration keeps for a site inside blocks that can be fitted in sequence: float32,
    but for the errors that choose ranks."""
    if isinstance(factors, NeuronFactors):
        return NestedNeurons.of(factors)
    if isinstance(factors, ScoreFactors | ValueFactors):
        fields = factors._asdict()
        return factors._replace(**{name: fields[name].float() for name in fields
                                   if name != "errors"})
    return factors


class _Factors(Mapping[str, SiteFactors]):
    """Site → factors as ``install_`` takes them: neurons with the weights of a dense model."""

    def __init__(self, kept: Mapping[str, SiteFactors], model: nn.Module) -> None:
        self.kept, self.model = kept, model

    def __getitem__(self, name: str) -> SiteFactors:
        found = self.kept[name]
        if isinstance(found, NestedNeurons):
            mlp = self.model.get_submodule(name.removesuffix(HIDDEN))
            return cast(SiteFactors, _PrunedNeurons(found, mlp))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


class _PrunedNeurons:
    """``NestedNeurons`` with the second projection that they belong to."""

    def __init__(self, found: NestedNeurons, mlp: nn.Module) -> None:
        parts = mlp_parts(mlp)
        assert parts is not None, "find_sites admits known MLPs only"
        self.found, self.fc2, self.errors = found, parts.linears[1], found.errors

    def pruned(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        bias = None if self.fc2.bias is None else self.fc2.bias.detach()
        return self.found.pruned(width, self.fc2.weight.detach(), bias)


def _fields(factors: SiteFactors) -> dict[str, Tensor]:
    found: Any = factors
    return found._asdict() if hasattr(found, "_asdict") else dict(vars(found))


def _made(kind: Any, name: str, tensors: Mapping[str, Tensor]) -> SiteFactors:
    fields = kind._fields if hasattr(kind, "_fields") else kind.__dataclass_fields__
    return kind(**{field: _restored(field, tensors[f"{name}|{field}"]) for field in fields})


def _stored(field: str, tensor: Tensor) -> Tensor:
    """Of a symmetric matrix the lower triangle; memory of its own."""
    if field == "covariance":
        lower, upper = torch.tril_indices(*tensor.shape)
        return tensor[lower, upper]
    return tensor.clone(memory_format=torch.contiguous_format)


def _restored(field: str, tensor: Tensor) -> Tensor:
    if field != "covariance":
        return tensor
    width = math.isqrt(2 * len(tensor))
    lower, upper = torch.tril_indices(width, width)
    whole = tensor.new_empty(width, width)
    whole[lower, upper] = whole[upper, lower] = tensor
    return whole
