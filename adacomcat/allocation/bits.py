"""Bytes → a plan: ranks and the bits of numbers, by one knapsack.

A byte can hold more ranks or finer numbers. Sites that one op computes, those of an attention or of
an MLP, have the same bits. What rounding loses there is measured as what truncation loses: by the
change of tokens and outputs where this place alone is rounded.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from adacomcat.allocation.candidates import Candidates, efficient
from adacomcat.allocation.deployment import allows
from adacomcat.allocation.fraction import FractionAllocator
from adacomcat.allocation.knapsack import Choice
from adacomcat.allocation.sensitivity import (
    PROBE_IMAGES,
    ErrorWeights,
    relative_change,
    weighted_error,
)
from adacomcat.convert.calibrate import BATCH
from adacomcat.convert.factors import Factors
from adacomcat.convert.model import ALLOCATION_IMAGES
from adacomcat.cost import model_bytes
from adacomcat.layers.quantized import QUANTIZED, QuantizedLinear
from adacomcat.layers.registry import is_position_network, mlp_parts
from adacomcat.plan import RankPlan
from adacomcat.quantization.model import rounded, token_layers
from adacomcat.sites import MULTIPLE, Rank, Site, find_sites
from adacomcat.utils.inputs import Inputs
from adacomcat.utils.limits import FLOAT_BITS
from adacomcat.utils.model import evaluating, replace_, tokens_and_outputs
from adacomcat.utils.progress import progress

# Place → bits → what rounding it adds to the sum that the knapsack makes least.
Rounding = dict[str, dict[int, float]]

HEADER = 128  # bytes of a tensor in the header of a file, beside its name
NAME = 24  # letters of a tensor's name behind that of its place


class BytesAllocator(FractionAllocator):
    """Plans whose file of weights has at most a fraction of the bytes of the dense model.

    Args:
        model: the dense model.
        factors: factors of every site, whose error curves say what a rank loses.
        sites: the decisions to take.
        batches: calibration images; without them rounding is judged by weights alone.
        keep: the fraction of the bytes to keep.
        bits: what numbers may have: 32 or 16 for floats, 8 and 4. Layers that do not work on
            tokens stay float.
        multiple: the step of ranks, halved where ``keep`` cannot be reached otherwise.
        deploy: the runtime whose fused attention the ranks must allow; see ``deployment``.
    """

    def __init__(self, model: nn.Module, factors: Factors, sites: list[Site],
                 batches: Sequence[Inputs] | None, *, keep: float, bits: Sequence[int],
                 multiple: int = MULTIPLE, deploy: str = "any") -> None:
        self.item_bytes = float_dtype(model, bits).itemsize
        super().__init__(sites, factors, lambda site, rank: site.params(rank) * self.item_bytes,
                         model_bytes(model), keep=keep, multiple=multiple, deploy=deploy)
        self.fixed += _file_bytes(model, self.item_bytes) - self.whole
        self.places = _places(model, sites)
        uncut = _places(model, find_sites(model, [site.module for site in sites
                                                  if site.kind == "hidden"]))
        whole = {place: found for place, found in self.places.items()
                 if len(found) == len(uncut[place])}  # filters leave out the rest of the others
        self.floats = bool(set(bits) & set(FLOAT_BITS))
        few = [number for number in bits if number in QUANTIZED]
        self.sizes: dict[tuple[str, int], list[tuple[tuple[Rank, ...], int | None, int]]] = {}
        self.rounding = rounding_changes(model, whole, few, batches) if few else {}

    def items(self, weights: ErrorWeights, step: int) -> list[Candidates]:
        return [self._of_place(place, sites, weights, step)
                for place, sites in self.places.items()]

    def _of_place(self, place: str, sites: tuple[Site, ...], weights: ErrorWeights,
                  step: int) -> Candidates:
        """Every combination of ranks and bits that no other beats in both bytes and error."""
        few = self.rounding.get(place, {})
        errors: list[dict[Rank, float]] = [
            {rank: weighted_error(self.factors, weights, site, rank)
             for rank in site.candidates(step)} for site in sites]
        options = []
        for ranks, number, size in self._sizes(place, sites, step):
            error = sum(known[rank] for known, rank in zip(errors, ranks, strict=True))
            options.append((Choice(size, error + few.get(number or 0, 0.0)), (ranks, number)))
        kept = efficient(options)
        return Candidates(sites, [ranks for _, (ranks, _) in kept], [choice for choice, _ in kept],
                          place, tuple(number for _, (_, number) in kept))

    def _sizes(self, place: str, sites: tuple[Site, ...],
               step: int) -> list[tuple[tuple[Rank, ...], int | None, int]]:
        """(ranks, bits, bytes) of every combination; the plans share them."""
        if (place, step) not in self.sizes:
            few = self.rounding.get(place, {})
            numbers: list[int | None] = [*few] if few and not self.floats else [None, *few]
            self.sizes[place, step] = [
                (ranks, number, size)
                for ranks in product(*(site.candidates(step) for site in sites))
                if allows(self.deploy, sites, ranks)
                for number, size in self._bytes(place, sites, ranks, numbers)]
        return self.sizes[place, step]

    def _bytes(self, place: str, sites: tuple[Site, ...], ranks: tuple[Rank, ...],
               numbers: list[int | None]) -> Iterator[tuple[int | None, int]]:
        """(bits, bytes) of these sites in a file, its header among them."""
        plan = RankPlan({site.name: rank for site, rank in zip(sites, ranks, strict=True)})
        matrices = [matrix for site in sites for matrix in site.matrices(plan[site.name])]
        floats = plan.params(sites) * self.item_bytes
        weights = sum(outputs * inputs for outputs, inputs in matrices) * self.item_bytes
        entries = 3 * len(matrices) * (len(place) + NAME + HEADER)  # weight, scale and bias
        for bits in numbers:
            stored = weights if bits is None else sum(QUANTIZED[bits].weight_bytes(*matrix)
                                                      for matrix in matrices)
            yield bits, floats - weights + stored + entries


def float_dtype(model: nn.Module, bits: Sequence[int]) -> torch.dtype:
    """What floats of ``model`` become: its own dtype where it has as many bits, or none are given.
    """
    own = next(model.parameters()).dtype
    if 32 in bits:
        return torch.float32
    return torch.bfloat16 if 16 in bits and own.itemsize != 2 else own


def _file_bytes(model: nn.Module, item_bytes: int) -> int:
    """At most, of the dense model's file with floats of this size."""
    return sum(tensor.numel() * (item_bytes if tensor.is_floating_point()
                                 else tensor.element_size()) + len(name) + HEADER
               for name, tensor in model.state_dict().items())


def _places(model: nn.Module, sites: list[Site]) -> dict[str, tuple[Site, ...]]:
    """Attentions, MLPs and single layers, each with its sites."""
    found: dict[str, tuple[Site, ...]] = {}
    for site in sites:
        above = site.module.rpartition(".")[0]
        inside = site.kind == "linear" and mlp_parts(model.get_submodule(above)) is not None
        place = above if inside else site.module
        found[place] = (*found.get(place, ()), site)
    return found


@torch.no_grad()
def rounding_changes(model: nn.Module, places: Mapping[str, tuple[Site, ...]],
                     bits: Sequence[int], batches: Sequence[Inputs] | None) -> Rounding:
    """What rounding each of ``places`` to each of ``bits`` loses.

    With images: the relative change of tokens and outputs, errors corrected as ``quantize`` does.
    Without: Σ |W - Ŵ|² / |W|² over its weights. A place that holds a layer which does not work on
    tokens is left out.
    """
    few = None if batches is None else list(batches[:ALLOCATION_IMAGES // BATCH])
    with evaluating(model):
        groups = token_layers(model, few)
        inside = _layers_inside(model, places, groups)
        wanted = {name for names in inside.values() for name in names}
        layers: dict[tuple[str, int], QuantizedLinear] = {}
        for name, layer in rounded(model, groups, few,
                                   lambda name: bits if name in wanted else ()):
            layers[name, layer.bits] = layer
        if few is None:
            return {place: {number: sum(_relative_error(model, name, layers[name, number])
                                        for name in names) for number in bits}
                    for place, names in inside.items()}
        images = few[0][:PROBE_IMAGES]
        dense = tokens_and_outputs(model, images)
        return {place: {number: _changed(model, {name: layers[name, number] for name in names},
                                         images, dense) for number in bits}
                for place, names in progress(list(inside.items()), "probing")}


def _layers_inside(model: nn.Module, places: Mapping[str, tuple[Site, ...]],
                   groups: list[list[str]]) -> dict[str, list[str]]:
    """Place → its linear layers, where all of them work on tokens."""
    known = {name for group in groups for name in group}
    found = {}
    for place in places:
        names = [f"{place}.{name}".rstrip(".") for name, module
                 in model.get_submodule(place).named_modules()
                 if isinstance(module, nn.Linear)
                 and not any(map(is_position_network, name.split(".")))]
        if known.issuperset(names):
            found[place] = names
    return found


def _relative_error(model: nn.Module, name: str, layer: QuantizedLinear) -> float:
    weight: Tensor = model.get_submodule(name).weight.double()  # type: ignore[union-attr]
    return ((layer.dense.double() - weight).square().sum()
            / weight.square().sum().clamp_min(1e-30)).item()


def _changed(model: nn.Module, layers: Mapping[str, QuantizedLinear], images: Inputs,
             dense: list[Tensor]) -> float:
    """The relative change of tokens and outputs with these layers in place."""
    whole = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        replace_(model, name, layer)
    found = tokens_and_outputs(model, images)
    for name, layer in whole.items():
        replace_(model, name, layer)
    return relative_change(dense, found)
