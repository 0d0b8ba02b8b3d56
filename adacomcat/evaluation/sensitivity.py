"""Which site hurts: the damage of each rank alone, measured, and the allocation's order.

The damage of a rank is Σ |f̂ - f|² / |f - mean|², summed over final tokens and outputs, where f̂ is
the dense model with this one site at this rank. The images that judge made no factors.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adacomcat.allocation.fraction import FractionAllocator, parameter_cost
from adacomcat.allocation.knapsack import Choice
from adacomcat.allocation.sensitivity import error_weights, relative_change
from adacomcat.convert.calibrate import BATCH
from adacomcat.convert.factors import Factors, factorize_model
from adacomcat.convert.install import low_rank_module
from adacomcat.convert.model import model_statistics
from adacomcat.cost import model_params
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, MULTIPLE, Rank, Site
from adacomcat.utils.inputs import Inputs, joined
from adacomcat.utils.model import evaluating, replace_, tokens_and_outputs
from adacomcat.utils.progress import progress

RANKS = 4  # candidate ranks of a site that are measured


class Step(NamedTuple):
    """One step of a shrinking budget: ``site`` goes from ``before`` to ``after``.

    kept: the share of the whole model's parameters that is left then.
    """

    site: str
    before: Rank
    after: Rank
    freed: int
    kept: float


@torch.no_grad()
def measured_damage(model: nn.Module, factors: Factors, batches: Sequence[Inputs],
                    sites: list[Site], count: int = RANKS) -> dict[str, dict[int, float]]:
    """Site → rank → damage, of at most ``count`` candidate ranks of each site."""
    found: dict[str, dict[int, float]] = {site.name: {} for site in sites}
    with evaluating(model):
        dense = _features(model, batches)
        for site in progress(sites, "measuring"):
            whole = model.get_submodule(site.module)
            for rank in spread_ranks(site, count):
                plan = RankPlan({site.name: rank})
                replace_(model, site.module, low_rank_module(whole, [site], plan, factors))
                try:
                    found[site.name][rank] = relative_change(dense, _features(model, batches))
                finally:
                    replace_(model, site.module, whole)
    return found


def _features(model: nn.Module, batches: Sequence[Inputs]) -> list[Tensor]:
    parts = [tokens_and_outputs(model, images) for images in batches]
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


def spread_ranks(site: Site, count: int = RANKS) -> list[int]:
    """At most ``count`` of the site's candidate ranks, evenly spread, the largest one among them.

    A site that is too small for the usual step has smaller ones.
    """
    step = MULTIPLE
    while True:
        ranks = [rank for rank in site.candidates(step) if rank != DENSE]
        if ranks or step == 1:
            break
        step //= 2
    count = min(count, len(ranks))
    return [ranks[(index + 1) * len(ranks) // count - 1] for index in range(count)]


def order_taken(model: nn.Module, sites: list[Site], factors: Factors,
                weights: dict[str, float]) -> list[Step]:
    """The steps that the allocation takes while the budget of parameters shrinks, in their order.

    These are the steps along the lower convex hull of each site's (parameters, weighted error),
    those that lose least per parameter first. The exact plan at a budget may differ by the few
    choices that fill what the last step leaves.
    """
    cost, whole = parameter_cost(model, sites)
    allocator = FractionAllocator(sites, factors, cost, whole, keep=1.0)
    steps: list[tuple[float, Step]] = []
    for site in sites:
        ranks, choices = _choices(allocator, site, weights)
        for slope, here, there in _descent(choices):
            freed = int(choices[here].cost - choices[there].cost)
            steps.append((slope, Step(site.name, ranks[here], ranks[there], freed, 0.0)))
    found, left = [], whole
    for _, step in sorted(steps, key=lambda entry: entry[0]):
        left -= step.freed
        found.append(step._replace(kept=left / whole))
    return found


def _choices(allocator: FractionAllocator, site: Site,
             weights: dict[str, float]) -> tuple[list[Rank], list[Choice]]:
    found = allocator.candidates((site,), weights, MULTIPLE)
    return [ranks[0] for ranks in found.ranks], found.choices


def _descent(choices: list[Choice]) -> Iterator[tuple[float, int, int]]:
    """Steps (error added per cost saved, from, to) from the dearest choice to the cheapest."""
    here = max(range(len(choices)), key=lambda i: choices[i].cost)
    while True:
        cheaper = [((c.error - choices[here].error) / (choices[here].cost - c.cost), c.cost, j)
                   for j, c in enumerate(choices) if c.cost < choices[here].cost]
        if not cheaper:
            return
        slope, _, best = min(cheaper)
        yield slope, here, best
        here = best


def sensitivity(model: nn.Module, batches: list[Inputs], sites: list[Site],
                ranks: int = RANKS) -> dict[str, Any]:
    """What ``inspect --sensitivity`` shows, in plain numbers, lists and dicts.

    Args:
        model: the dense model.
        batches: at least two images; the first half calibrates, the second half judges.
        sites: the sites to look at.
        ranks: how many ranks of each site are measured.

    Returns:
        'sites': of each one the 'damage' and the parameters 'freed' at each measured rank, and
        'first_cut', the share of the model's parameters at which the allocation begins with it
        (None: it never does). 'blocks': block → the sites' damages alone, summed, each at the
        middle one of its measured ranks. 'order': the steps of the allocation.

    Raises:
        UserError: there is one image only.
    """
    images = joined(batches)
    half = len(images) // 2
    if not half:
        raise UserError("sensitivity needs two images: one half calibrates, the other judges")
    fitting, judging = list(images[:half].split(BATCH)), list(images[half:].split(BATCH))
    factors = factorize_model(model, model_statistics(model, fitting), sites=sites)
    damage = measured_damage(model, factors, judging, sites, ranks)
    order = order_taken(model, sites, factors, error_weights(model, factors, fitting, sites))
    whole = model_params(model)
    first = {step.site: step.kept + step.freed / whole for step in reversed(order)}
    rows = [{"site": site.name, "kind": site.kind, "full_rank": site.full_rank,
             "params": site.dense_params, "damage": damage[site.name],
             "freed": {rank: site.dense_params - site.params(rank) for rank in damage[site.name]},
             "first_cut": first.get(site.name)} for site in sites]
    return {"calibrating": half, "judging": len(images) - half, "sites": rows,
            "blocks": _by_block(rows), "order": [step._asdict() for step in order]}


def block_of(name: str) -> str:
    """'blocks.3.mlp.fc1' → 'blocks.3'; without a number the name itself."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=len(parts) - 1)
    return ".".join(parts[:last + 1])


def _by_block(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Block → the damage of its sites alone, summed, each at the middle one of its ranks."""
    sums: dict[str, float] = {}
    for row in rows:
        ranks = sorted(row["damage"])
        if ranks:
            block = block_of(row["site"])
            sums[block] = sums.get(block, 0.0) + row["damage"][ranks[(len(ranks) - 1) // 2]]
    return sums
