"""Budget → plan, without a search: a multiple-choice knapsack over truncation errors."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adacomcat.calibrate import calibration_batches, evaluating, tokens_and_outputs
from adacomcat.convert import Factors, low_rank_module
from adacomcat.cost import model_params, module_tokens, plan_macs, site_macs
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.progress import progress
from adacomcat.sequential import sequential_blocks
from adacomcat.sites import DENSE, MULTIPLE, Rank, Site, find_sites

PROBE_IMAGES = 4

# Of the sum of single errors this much is left where all blocks are fitted in sequence, for then
# outputs are refitted to what scores and values lost. Half of each kind alone, DINOv2 ViT-S, on
# photographs kept from calibration (examples/dinov2): 0.03 of 0.23, 0.12 of 0.42, 0.15 of 0.26.
LEFT_IN_SEQUENCE = {"qk": 0.13, "vo": 0.28, "hidden": 0.57}


@dataclass(frozen=True)
class Choice:
    """One candidate of one item: what it costs and how much it hurts."""

    cost: float
    error: float


def knapsack(items: list[list[Choice]], budget: float) -> list[int] | None:
    """One choice per item, least total error within ``budget``; None where nothing fits.

    Walks the lower convex hull of every item's (cost, error) curve in order of error saved per
    cost (the Lagrangian solution), then spends what is left on single upgrades.
    """
    chosen = [min(range(len(item)), key=lambda i: (item[i].cost, item[i].error))
              for item in items]
    spent = sum(item[i].cost for item, i in zip(items, chosen, strict=True))
    if spent > budget:
        return None
    steps = [(slope, k, i, j) for k, item in enumerate(items)
             for slope, i, j in _hull_steps(item, chosen[k])]
    blocked: set[int] = set()
    for _, k, i, j in sorted(steps, key=lambda step: -step[0]):
        extra = items[k][j].cost - items[k][i].cost
        if k in blocked or spent + extra > budget:
            blocked.add(k)
        else:
            chosen[k], spent = j, spent + extra
    _spend_rest(items, chosen, budget - spent)
    return chosen


def _hull_steps(item: list[Choice], start: int) -> list[tuple[float, int, int]]:
    """Steps (error saved per cost, from, to) along the lower convex hull, steepest first."""
    steps, here = [], start
    while True:
        ahead = [(((item[here].error - c.error) / (c.cost - item[here].cost)), j)
                 for j, c in enumerate(item)
                 if c.cost > item[here].cost and c.error < item[here].error]
        if not ahead:
            return steps
        slope, best = max(ahead)
        steps.append((slope, here, best))
        here = best


def _spend_rest(items: list[list[Choice]], chosen: list[int], rest: float) -> None:
    while True:
        upgrades = [(items[k][i].error - c.error, k, j)
                    for k, i in enumerate(chosen) for j, c in enumerate(items[k])
                    if c.error < items[k][i].error and c.cost - items[k][i].cost <= rest]
        if not upgrades:
            return
        _, k, j = max(upgrades)
        rest -= items[k][j].cost - items[k][chosen[k]].cost
        chosen[k] = j


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


def choices(site: Site, factors: Factors, weights: dict[str, float], cost: "Cost",
            multiple: int) -> list[Choice]:
    return [Choice(cost(site, rank), weighted_error(factors, weights, site, rank))
            for rank in site.candidates(multiple)]


# Weights of all sites' errors → the plan of least error within a budget.
Allocate = Callable[[dict[str, float]], RankPlan]


def choose_plan(model: nn.Module, factors: Factors, *, keep_params: float | None = None,
                keep_macs: float | None = None, calibration: Tensor | Iterable | None = None,
                multiple: int = MULTIPLE, sites: list[Site] | None = None) -> RankPlan:
    """The knapsack's plan for a budget given as a fraction of the whole model.

    sites: the decisions to take; every rank where not given.

    Where the budget cannot be reached with ranks in steps of ``multiple``, the steps are halved.
    """
    sites = find_sites(model) if sites is None else sites
    allocate = allocator(model, factors, sites, keep_params=keep_params, keep_macs=keep_macs,
                         multiple=multiple)
    return allocate(error_weights(model, factors, calibration, sites))


def allocator(model: nn.Module, factors: Factors, sites: list[Site], *,
              keep_params: float | None = None, keep_macs: float | None = None,
              multiple: int = MULTIPLE) -> Allocate:
    """``choose_plan`` for any weights."""
    keep = keep_params if keep_params is not None else keep_macs
    if not 0 < keep <= 1:
        raise UserError(f"keep must be a fraction in (0, 1], like 0.5; got {keep}")
    cost, whole = _parameter_cost(model) if keep_macs is None else _mac_cost(model, sites)
    fixed = whole - sum(cost(site, DENSE) for site in sites)

    def allocate(weights: dict[str, float]) -> RankPlan:
        step = multiple
        while step:
            items = [choices(site, factors, weights, cost, step) for site in sites]
            chosen = knapsack(items, keep * whole - fixed)
            if chosen is not None:
                return RankPlan({site.name: site.candidates(step)[index]
                                 for site, index in zip(sites, chosen, strict=True)})
            step //= 2
        least = (fixed + sum(min(c.cost for c in item) for item in items)) / whole
        raise UserError(f"keep {keep:g} is below what is reachable here; the least is {least:.4f}")

    return allocate


Cost = Callable[[Site, Rank], float]


def _parameter_cost(model: nn.Module) -> tuple[Cost, float]:
    return (lambda site, rank: site.params(rank)), model_params(model)


def _mac_cost(model: nn.Module, sites: list[Site]) -> tuple[Cost, float]:
    tokens = module_tokens(model, (site.module for site in sites))
    return (lambda site, rank: site_macs(site, rank, tokens)), plan_macs(model, RankPlan())
