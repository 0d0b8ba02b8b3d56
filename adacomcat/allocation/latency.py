"""Milliseconds → plan: the knapsack over measured times, corrected by whole models.

The sum of its parts is not a model's latency (parts are timed one after the other, their weights
nearer in cache), so the model that a plan makes is measured too, and the budget that the knapsack
gets is corrected by what the sum was wrong, a few times.
"""

import logging
import warnings
from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

from torch import Tensor, nn

from adacomcat.allocation.budget import Allocate
from adacomcat.allocation.knapsack import Choice, knapsack
from adacomcat.allocation.sensitivity import error_weights, weighted_error
from adacomcat.convert.factors import Factors
from adacomcat.errors import UserError
from adacomcat.latency.blocks import Unit
from adacomcat.latency.table import LatencyTable
from adacomcat.latency.timing import Measure, measure
from adacomcat.plan import RankPlan
from adacomcat.sites import MULTIPLE, Rank, Site

LOG = logging.getLogger(__name__)

AIM, NEAR = 0.985, 0.015  # from 97 to 100 % of the budget
ROUNDS = 6

Ranks = tuple[Rank, ...]


class Candidates(NamedTuple):
    """Of one unit: ranks, and what they cost and lose."""

    unit: Unit
    ranks: list[Ranks]
    choices: list[Choice]


class Measured(NamedTuple):
    plan: RankPlan
    ms: float
    target: float  # that the sum of the parts was held to


def choose_plan_for_latency(model: nn.Module, factors: Factors, *, max_latency_ms: float,
                            batch: int = 1, calibration: Tensor | Iterable | None = None,
                            multiple: int = MULTIPLE, sites: list[Site],
                            measure: Measure = measure) -> RankPlan:
    """The plan of least error whose model, as deployed, takes ``max_latency_ms`` for ``batch``
    images on this machine, measured, or up to 3 % less where ranks allow no more.

    Ranks go in steps of ``multiple``; UserError where the fastest model is too slow.
    """
    allocate = latency_allocator(model, factors, sites, max_latency_ms=max_latency_ms,
                                 batch=batch, multiple=multiple, measure=measure)
    return allocate(error_weights(model, factors, calibration, sites))


def latency_allocator(model: nn.Module, factors: Factors, sites: list[Site], *,
                      max_latency_ms: float, batch: int = 1, multiple: int = MULTIPLE,
                      measure: Measure = measure) -> Allocate:
    """``choose_plan_for_latency`` for any weights; parts are timed once."""
    if not max_latency_ms > 0:
        raise UserError(f"max_latency_ms must be above 0; got {max_latency_ms}")
    table = LatencyTable(model, sites, batch, multiple, measure)

    def allocate(weights: dict[str, float]) -> RankPlan:
        items = [_candidates(unit, factors, weights, table, multiple) for unit in table.units]
        plan, ms, _ = _fitted(items, table, max_latency_ms)
        LOG.info("%.2f ms of a budget of %g ms; dense %.2f ms", ms, max_latency_ms,
                 table.dense_ms)
        if ms > max_latency_ms:
            warnings.warn(f"the fastest model tried takes {ms:.2f} ms, above {max_latency_ms:g} "
                          "ms; timings vary here, a quieter machine would serve better",
                          stacklevel=2)
        return plan

    return allocate


def _candidates(unit: Unit, factors: Factors, weights: dict[str, float], table: LatencyTable,
                multiple: int) -> Candidates:
    """Every combination of the unit's ranks that no other beats in both time and error."""
    errors = [{rank: weighted_error(factors, weights, site, rank)
               for rank in site.candidates(multiple)} for site in unit.sites]
    combined = [(Choice(table(unit, ranks), sum(e[rank] for e, rank in
                                                zip(errors, ranks, strict=True))), ranks)
                for ranks in product(*errors)]
    combined.sort(key=lambda pair: (pair[0].cost, pair[0].error))
    kept: list[tuple[Choice, Ranks]] = []
    for choice, ranks in combined:
        if not kept or choice.error < kept[-1][0].error:
            kept.append((choice, ranks))
    return Candidates(unit, [ranks for _, ranks in kept], [choice for choice, _ in kept])


def _fitted(items: list[Candidates], table: LatencyTable, budget: float) -> Measured:
    aim, target = AIM * budget, AIM * budget
    tried: list[Measured] = []
    for _ in range(ROUNDS):
        chosen = _chosen(items, target - table.fixed_ms)
        plan = _plan(items, chosen)
        if any(plan == known.plan for known in tried):
            break
        ms = table.plan_ms(plan)
        tried.append(Measured(plan, ms, target))
        if not any(chosen) and all(known.ms > budget for known in tried):
            raise UserError(f"a latency of {budget:g} ms is below what is reachable here; the "
                            f"least is {ms:.2f} ms (dense: {table.dense_ms:.2f} ms)")
        if abs(ms / aim - 1) <= NEAR:
            break
        target = _next_target(tried, aim)
    return min(tried, key=lambda known: (known.ms > budget, abs(known.ms - aim)))


def _next_target(tried: list[Measured], aim: float) -> float:
    """What to ask of the knapsack, for the model to take ``aim``: between the nearest models on
    either side of it, or else by the factor that the sum was wrong."""
    below = max((known for known in tried if known.ms <= aim), default=None, key=_ms)
    above = min((known for known in tried if known.ms > aim), default=None, key=_ms)
    if below is None or above is None:
        nearest = below or above
        return nearest.target * aim / nearest.ms
    share = (aim - below.ms) / (above.ms - below.ms)
    return below.target + share * (above.target - below.target)


def _ms(known: Measured) -> float:
    return known.ms


def _chosen(items: list[Candidates], budget: float) -> list[int]:
    """The knapsack's choices; the fastest of each where not even those fit."""
    return knapsack([item.choices for item in items], budget) or [0] * len(items)


def _plan(items: list[Candidates], chosen: list[int]) -> RankPlan:
    ranks = {site.name: rank for item, index in zip(items, chosen, strict=True)
             for site, rank in zip(item.unit.sites, item.ranks[index], strict=True)}
    return RankPlan(ranks)
