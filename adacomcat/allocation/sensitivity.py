"""What the truncation error of each site counts: measured on a few images, or data-free."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from adacomcat.convert.factors import Factors
from adacomcat.convert.install import low_rank_module
from adacomcat.convert.sequential import sequential_blocks
from adacomcat.factorize.neurons import NeuronFactors
from adacomcat.layers.mlp import prune_mlp
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, Rank, Site
from adacomcat.utils.inputs import Inputs
from adacomcat.utils.model import evaluating, replace_, tokens_and_outputs
from adacomcat.utils.progress import progress

# Site name → what its squared error counts in the sum that the knapsack makes least.
ErrorWeights = dict[str, float]

PROBE_IMAGES = 4

# Fitting the blocks in sequence repairs a part of each kind's error, for it refits the outputs to
# what scores and values lost. These parts remain. Measured on DINOv2 ViT-S with half of the ranks
# of one kind at a time, as relative feature error on photographs kept from calibration
# (examples/dinov2): qk 0.03 in sequence and 0.23 without, vo 0.12 and 0.42, hidden 0.15 and 0.26.
LEFT_IN_SEQUENCE = {"qk": 0.13, "vo": 0.28, "hidden": 0.57}


def sensitivities(model: nn.Module, factors: Factors, images: Inputs,
                  sites: list[Site]) -> ErrorWeights:
    """How much of each site's own error reaches the outputs, measured.

    One site at a time is truncated to half its break-even rank. The site's sensitivity is the
    relative change of tokens and outputs, steadied, over the site's truncation error.
    """
    return weights_of_changes(sites, probed_changes(model, factors, images, sites), factors)


@torch.no_grad()
def probed_changes(model: nn.Module, factors: Factors, images: Inputs,
                   sites: list[Site]) -> dict[str, float]:
    """Site → the relative change of tokens and outputs where this site alone is truncated."""
    changes = {}
    with evaluating(model):
        dense = tokens_and_outputs(model, images)
        for site in progress(sites, "probing"):
            whole = model.get_submodule(site.module)
            replace_(model, site.module, probe_module(whole, site, factors))
            changes[site.name] = relative_change(dense, tokens_and_outputs(model, images))
            replace_(model, site.module, whole)
    return changes


def _probe_rank(site: Site) -> int:
    return max(1, int(site.break_even) // 2)


def probe_module(whole: nn.Module, site: Site, factors: Factors) -> nn.Module:
    """``whole`` with its site truncated to half its break-even rank."""
    rank = _probe_rank(site)
    found = factors[site.name]
    if isinstance(found, NeuronFactors):
        return prune_mlp(cast(Any, whole), *found.nested(rank))
    return low_rank_module(whole, [site], RankPlan({site.name: rank}), factors)


def weights_of_changes(sites: list[Site], changes: Mapping[str, float],
                       factors: Factors) -> ErrorWeights:
    """Sensitivities from the relative changes that the probes made."""
    found = _steadied(sites, [changes[site.name] for site in sites])
    own = [max(factors[site.name].errors[_probe_rank(site)].item(), 1e-30) for site in sites]
    return {site.name: change / error for site, change, error
            in zip(sites, found, own, strict=True)}


def _steadied(sites: list[Site], changes: list[float]) -> list[float]:
    """Few images measure with much noise, so every log change moves halfway to the mean over the
    sites of its kind and shape."""
    logs = [math.log(max(change, 1e-30)) for change in changes]
    kinds = [(site.kind, site.in_features, site.out_features) for site in sites]
    means = {kind: statistics.fmean(log for log, k in zip(logs, kinds, strict=True) if k == kind)
             for kind in kinds}
    return [math.exp((log + means[kind]) / 2) for log, kind in zip(logs, kinds, strict=True)]


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """Σ |after - before|² / |before - mean|², over the pairs of tensors."""
    total = 0.0
    for old, new in zip(before, after, strict=True):
        old, new = old.double(), new.double()  # squares of float16 overflow
        spread = (old - old.mean(0)).square().sum().clamp_min(1e-30)
        total += ((new - old).square().sum() / spread).item()
    return total


def relative_sensitivities(sites: list[Site], factors: Factors) -> ErrorWeights:
    """Data-free: every site's error counts relative to what the site computes."""
    return {site.name: 1.0 / max(factors[site.name].errors[0].item(), 1e-30) for site in sites}


def error_weights(model: nn.Module, factors: Factors, batches: Sequence[Inputs] | None,
                  sites: list[Site]) -> ErrorWeights:
    """The weights at which the knapsack starts: measured where there are images."""
    if batches is None:
        return relative_sensitivities(sites, factors)
    weights = sensitivities(model, factors, batches[0][:PROBE_IMAGES], sites)
    return left_in_sequence(sites, weights) if sequential_blocks(model) else weights


def left_in_sequence(sites: list[Site], weights: ErrorWeights) -> ErrorWeights:
    """``weights`` where the blocks are fitted in sequence after the allocation."""
    if not any(site.kind == "hidden" for site in sites):
        return weights
    return {site.name: LEFT_IN_SEQUENCE.get(site.kind, 1.0) * weights[site.name]
            for site in sites}


def weighted_error(factors: Factors, weights: ErrorWeights, site: Site, rank: Rank) -> float:
    """What ``site`` adds to the sum at ``rank``; nothing where it stays dense."""
    if rank == DENSE:
        return 0.0
    return weights[site.name] * factors[site.name].errors[rank].item()
