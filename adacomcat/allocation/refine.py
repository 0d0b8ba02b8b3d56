"""A plan refined on the true loss of images that fitted nothing.

The knapsack trusts a sum of single errors. Its weights are moved along a few directions, one at a
time; each move gives a whole plan at the budget, which is kept where held-out images lose less: a
coordinate search whose steps are halved where no direction helps (Hooke and Jeeves, 1961). Random
mutations of the same directions and of single sites came no further with 8 to 32 plans
(examples/fashion_mnist).
"""

import copy
import math
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adacomcat.allocation.budget import Allocate
from adacomcat.allocation.sensitivity import error_weights, relative_change
from adacomcat.convert.calibrate import BATCH
from adacomcat.convert.factors import Factors, factorize_model
from adacomcat.convert.install import install_
from adacomcat.convert.model import model_statistics
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import Rank, Site
from adacomcat.utils.model import evaluating, tokens_and_outputs
from adacomcat.utils.progress import progress

STEP = math.log(4.0)  # of the logarithm of a weight
LEAST_STEP = STEP / 8
JUDGES = 128  # images

Weights = dict[str, float]
Direction = dict[str, float]  # site → how much of a step its log weight takes
Proposals = Generator[RankPlan, bool, None]  # is sent whether the last plan was kept


class Refined(NamedTuple):
    """The best plan, where it came from, and their losses."""

    plan: RankPlan
    loss: float
    start: RankPlan
    start_loss: float
    tried: int  # candidates

    @property
    def changed(self) -> dict[str, tuple[Rank, Rank]]:
        """Site → its rank before and after, where they differ."""
        return {name: (self.start[name], rank) for name, rank in self.plan.ranks.items()
                if rank != self.start[name]}

    def summary(self) -> dict[str, Any]:
        """In plain numbers, lists and dicts."""
        return {"tried": self.tried, "start_loss": self.start_loss, "loss": self.loss,
                "changed": {name: list(ranks) for name, ranks in self.changed.items()}}


def refine(start: RankPlan, proposals: Proposals, evaluate: Callable[[RankPlan], float],
           candidates: int) -> Refined:
    """The best of ``start`` and at most ``candidates`` proposals; the loss never rises.

    A plan that was seen before is neither evaluated nor counted.
    """
    if candidates < 1:
        raise UserError(f"refine must be at least 1, a number of plans to try; got {candidates}")
    best, seen = start, [start]
    start_loss = loss = evaluate(start)
    kept: bool | None = None  # what a generator that has not begun is sent
    for _ in progress(range(candidates), "refining"):
        plan = _unseen(proposals, kept, seen)
        if plan is None:
            break
        seen.append(plan)
        found = evaluate(plan)
        kept = found < loss
        if kept:
            best, loss = plan, found
    proposals.close()
    return Refined(best, loss, start, start_loss, len(seen) - 1)


def _unseen(proposals: Proposals, kept: bool | None, seen: list[RankPlan]) -> RankPlan | None:
    try:
        plan = proposals.send(kept)
        while plan in seen:
            plan = proposals.send(False)
    except StopIteration:
        return None
    return plan


def directions(sites: list[Site]) -> list[Direction]:
    """Early against late sites; then each kind against the one with the most parameters."""
    order = {name: index for index, name in enumerate(dict.fromkeys(s.module for s in sites))}
    last = max(1, len(order) - 1)
    depth = {site.name: 2 * order[site.module] / last - 1 for site in sites}
    size: dict[str, int] = {}
    for site in sites:
        size[site.kind] = size.get(site.kind, 0) + site.dense_params
    *others, _ = sorted(size, key=size.__getitem__)
    return [depth, *({site.name: float(site.kind == kind) for site in sites}
                     for kind in reversed(others))]


def coordinate_search(allocate: Allocate, weights: Weights, along: list[Direction]) -> Proposals:
    """Plans for weights w · exp(± step · direction), one direction at a time."""
    steps = [STEP] * len(along)
    while any(step >= LEAST_STEP for step in steps):
        for index, direction in enumerate(along):
            for sign in (1.0, -1.0):
                moved = _moved(weights, direction, sign * steps[index])
                if (yield allocate(moved)):
                    weights = moved
                    break
            else:
                steps[index] /= 2


def _moved(weights: Weights, direction: Direction, step: float) -> Weights:
    return {name: weight * math.exp(step * direction.get(name, 0.0))
            for name, weight in weights.items()}


def refined_allocation(allocate: Allocate, weights: Weights, sites: list[Site],
                       evaluate: Callable[[RankPlan], float], candidates: int) -> Refined:
    """From the plan of these weights, by coordinate search."""
    proposals = coordinate_search(allocate, weights, directions(sites))
    return refine(allocate(weights), proposals, evaluate, candidates)


def refined_on_images(model: nn.Module, sites: list[Site],
                      budget: Callable[[Factors, list[Site]], Allocate], images: list[Tensor],
                      candidates: int) -> Refined:
    """The first half of the images makes factors, the second judges plans.

    budget: what makes an ``Allocate`` of factors and sites
    """
    fitting, judging = _halves(images)
    factors = factorize_model(model, model_statistics(model, fitting), sites=sites)
    weights = error_weights(model, factors, fitting, sites)
    evaluate = feature_distance(model, factors, judging)
    return refined_allocation(budget(factors, sites), weights, sites, evaluate, candidates)


def _halves(batches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    images = torch.cat(batches)
    half = len(images) // 2
    if half < 2:
        raise UserError(f"refine needs at least 4 calibration images, half of them to judge; got "
                        f"{len(images)}")
    return list(images[:half].split(BATCH)), list(images[half:][:JUDGES].split(BATCH))


@torch.no_grad()
def feature_distance(model: nn.Module, factors: Factors,
                     batches: list[Tensor]) -> Callable[[RankPlan], float]:
    """plan → |f̂ - f|² / |f - mean|², summed over final tokens and outputs, f̂ with these factors.

    Blocks are not fitted in sequence here: with the few images that there is time for, the fit's
    own noise hides what plans differ in (examples/fashion_mnist).
    """
    def features(of: nn.Module) -> list[Tensor]:
        with evaluating(of):
            found = [tokens_and_outputs(of, images) for images in batches]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    @torch.no_grad()
    def distance(plan: RankPlan) -> float:
        return relative_change(dense, features(install_(copy.deepcopy(model), plan, factors)))

    dense = features(model)
    return distance
