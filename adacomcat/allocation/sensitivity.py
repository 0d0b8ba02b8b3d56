"""Budget → plan, without a search: a multiple-choice knapsack over truncation errors."""

import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from adacomcat.convert.calibrate import calibration_batches
from adacomcat.convert.factors import Factors
from adacomcat.convert.install import low_rank_module
from adacomcat.convert.sequential import sequential_blocks
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, Rank, Site
from adacomcat.utils.model import evaluating, tokens_and_outputs
from adacomcat.utils.progress import progress

PROBE_IMAGES = 4

# Of the sum of single errors this much is left where all blocks are fitted in sequence, for then
# outputs are refitted to what scores and values lost. Half of each kind alone, DINOv2 ViT-S, on
# photographs kept from calibration (examples/dinov2): 0.03 of 0.23, 0.12 of 0.42, 0.15 of 0.26.
LEFT_IN_SEQUENCE = {"qk": 0.13, "vo": 0.28, "hidden": 0.57}


@torch.no_grad()
def sensitivities(model: nn.Module, factors: Factors, images: Tensor,
                  sites: list[Site]) -> dict[str, float]:
    """How much of each site's own error reaches the outputs, measured.

    Each site alone is truncated to half its break-even rank; the relative change of tokens and
    outputs, steadied, over the truncation error of that site is its sensitivity.
    """
    changes, own = [], []
    with evaluating(model):
        dense = tokens_and_outputs(model, images)
        for site in progress(sites, "probing"):
            rank = max(1, int(site.break_even) // 2)
            whole = model.get_submodule(site.module)
            plan = RankPlan({site.name: rank})
            model.set_submodule(site.module, low_rank_module(whole, [site], plan, factors))
            changes.append(relative_change(dense, tokens_and_outputs(model, images)))
            model.set_submodule(site.module, whole)
            own.append(max(factors[site.name].errors[rank].item(), 1e-30))
    return {site.name: change / error for site, change, error
            in zip(sites, _steadied(sites, changes), own, strict=True)}


def _steadied(sites: list[Site], changes: list[float]) -> list[float]:
    """Few images measure with much noise: every log change goes halfway to the mean of the sites
    of its kind and shape."""
    logs = [math.log(max(change, 1e-30)) for change in changes]
    kinds = [(site.kind, site.in_features, site.out_features) for site in sites]
    means = {kind: statistics.fmean(log for log, k in zip(logs, kinds, strict=True) if k == kind)
             for kind in kinds}
    return [math.exp((log + means[kind]) / 2) for log, kind in zip(logs, kinds, strict=True)]


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    return sum(((b - a).square().sum() / (a - a.mean(0)).square().sum().clamp_min(1e-30)).item()
               for a, b in zip(before, after, strict=True))


def relative_sensitivities(sites: list[Site], factors: Factors) -> dict[str, float]:
    """Data-free: every site's error counts relative to what the site computes."""
    return {site.name: 1.0 / max(factors[site.name].errors[0].item(), 1e-30) for site in sites}


def error_weights(model: nn.Module, factors: Factors, calibration: Tensor | Iterable | None,
                  sites: list[Site]) -> dict[str, float]:
    """What the squared error of each site counts in the sum that the knapsack makes least."""
    if calibration is None:
        return relative_sensitivities(sites, factors)
    images = calibration_batches(calibration, model)[0][:PROBE_IMAGES]
    weights = sensitivities(model, factors, images, sites)
    if not (sequential_blocks(model) and any(site.kind == "hidden" for site in sites)):
        return weights
    return {site.name: LEFT_IN_SEQUENCE.get(site.kind, 1.0) * weights[site.name]
            for site in sites}


def weighted_error(factors: Factors, weights: dict[str, float], site: Site, rank: Rank) -> float:
    return 0.0 if rank == DENSE else weights[site.name] * factors[site.name].errors[rank].item()
