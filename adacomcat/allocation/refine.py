"""A plan refined on the true loss of images that fitted nothing.

The knapsack trusts a sum of single errors. A refinement moves its weights along a few directions,
one at a time. Each move gives a whole plan at the budget, which is kept where held-out images lose
less: a coordinate search whose steps are halved where no direction helps (Hooke and Jeeves, 1961).
Random mutations of the same directions and of single sites came no further with 8 to 32 plans
(examples/fashion_mnist).
"""

import math
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor, nn

from adacomcat.allocation.budget import Budget
from adacomcat.allocation.sensitivity import ErrorWeights, error_weights, relative_change
from adacomcat.convert.calibrate import BATCH
from adacomcat.convert.factors import Factors, factorize_model
from adacomcat.convert.install import install_
from adacomcat.convert.model import model_statistics
from adacomcat.convert.record import Refined
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import Site
from adacomcat.utils.inputs import Inputs, joined
from adacomcat.utils.model import copied, evaluating, tokens_and_outputs
from adacomcat.utils.progress import progress

STEP = math.log(4.0)  # of the logarithm of a weight
LEAST_STEP = STEP / 8
MOST_JUDGING_IMAGES = 128

PlanFor = Callable[[ErrorWeights], RankPlan]  # as ``Allocator.plan``: at the budget
Loss = Callable[[RankPlan], float]
Direction = dict[str, float]  # site → how much of a step its log weight takes
Proposals = Generator[RankPlan, bool | None, None]  # is sent whether the last plan was kept


def refine(start: RankPlan, proposals: Proposals, loss_of: Loss, candidates: int) -> Refined:
    """The best of ``start`` and at most ``candidates`` proposals; the loss never rises.

    A plan that was seen before is neither evaluated nor counted.
    """
    if candidates < 1:
        raise UserError(f"refine must be at least 1, a number of plans to try; got {candidates}")
    best, seen = start, [start]
    start_loss = loss = loss_of(start)
    kept: bool | None = None  # what a generator that has not begun is sent
    for _ in progress(range(candidates), "refining"):
        plan = _unseen(proposals, kept, seen)
        if plan is None:
            break
        seen.append(plan)
        found = loss_of(plan)
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


def coordinate_search(plan_for: PlanFor, weights: ErrorWeights,
                      along: list[Direction]) -> Proposals:
    """Plans for weights w · exp(± step · direction), one direction at a time."""
    steps = [STEP] * len(along)
    while any(step >= LEAST_STEP for step in steps):
        for index, direction in enumerate(along):
            for sign in (1.0, -1.0):
                moved = _moved(weights, direction, sign * steps[index])
                if (yield plan_for(moved)):
                    weights = moved
                    break
            else:
                steps[index] /= 2


def _moved(weights: ErrorWeights, direction: Direction, step: float) -> ErrorWeights:
    return {name: weight * math.exp(step * direction.get(name, 0.0))
            for name, weight in weights.items()}


def refined_allocation(plan_for: PlanFor, weights: ErrorWeights, sites: list[Site], loss_of: Loss,
                       candidates: int) -> Refined:
    """A coordinate search from the plan of these weights.

    Args:
        plan_for: error weights → the plan at the budget, as ``Allocator.plan``.
        weights: where the search starts.
        sites: the sites that are allocated.
        loss_of: plan → the loss that decides.
        candidates: how many plans are tried at most beside the first.

    Raises:
        UserError: ``candidates`` is below 1.
    """
    proposals = coordinate_search(plan_for, weights, directions(sites))
    return refine(plan_for(weights), proposals, loss_of, candidates)


def refined_on_images(model: nn.Module, sites: list[Site], budget: Budget, batches: list[Inputs],
                      candidates: int) -> Refined:
    """The plan at ``budget`` that keeps closest to the dense model, of those tried.

    The first half of the images makes the factors, the second half judges the plans.
    """
    fitting, judging = _halves(batches)
    factors = factorize_model(model, model_statistics(model, fitting, sites), sites=sites)
    weights = error_weights(model, factors, fitting, sites)
    loss_of = feature_distance(model, factors, judging)
    plan_for = budget.allocator(model, factors, sites, fitting).plan
    return refined_allocation(plan_for, weights, sites, loss_of, candidates)


def _halves(batches: list[Inputs]) -> tuple[list[Inputs], list[Inputs]]:
    images = joined(batches)
    half = len(images) // 2
    if half < 2:
        raise UserError(f"refine needs at least 4 calibration images, half of them to judge; got "
                        f"{len(images)}")
    return list(images[:half].split(BATCH)), list(images[half:][:MOST_JUDGING_IMAGES].split(BATCH))


@torch.no_grad()
def feature_distance(model: nn.Module, factors: Factors, batches: Sequence[Inputs]) -> Loss:
    """plan → |f̂ - f|² / |f - mean|², summed over final tokens and outputs, f̂ with these factors.

    Blocks are not fitted in sequence here. There is time for few images only, and with few images
    the fit's own noise hides what plans differ in (examples/fashion_mnist).
    """
    def features(of: nn.Module) -> list[Tensor]:
        with evaluating(of):
            found = [tokens_and_outputs(of, images) for images in batches]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    @torch.no_grad()
    def distance(plan: RankPlan) -> float:
        return relative_change(dense, features(install_(copied(model), plan, factors)))

    dense = features(model)
    return distance
