"""Milliseconds → a plan: the knapsack over measured times, corrected by whole models.

A model's latency is not the sum of its parts' latencies: parts are timed one after the other, with
their weights nearer in cache. So the model that a plan makes is measured too. The budget that the
knapsack gets is then corrected by the error of the sum, a few times.
"""

import logging
import warnings
from itertools import product
from typing import NamedTuple

from torch import nn

from adacomcat.allocation.candidates import Candidates, choose, efficient, plan_of
from adacomcat.allocation.deployment import allows
from adacomcat.allocation.knapsack import Choice
from adacomcat.allocation.sensitivity import ErrorWeights, weighted_error
from adacomcat.convert.factors import Factors
from adacomcat.errors import UserError
from adacomcat.latency.blocks import TimedBlock
from adacomcat.latency.table import LatencyTable
from adacomcat.latency.timing import Measure, measure
from adacomcat.plan import RankPlan
from adacomcat.sites import MULTIPLE, Rank, Site

LOG = logging.getLogger(__name__)

AIM, NEAR = 0.985, 0.015  # a model from 97 to 100 % of the budget is near enough
MOST_MODELS = 6  # whole models that one plan may take to measure


class Measured(NamedTuple):
    """A plan, its model's measured latency, and the sum of parts that the knapsack was held to."""

    plan: RankPlan
    ms: float
    target: float


class LatencyAllocator:
    """Plans whose model, as deployed, takes ``max_latency_ms`` at most, measured on this machine.

    The model's parts are timed once, here; every plan uses these times.

    Args:
        model: the dense model, on the device that counts.
        factors: factors of every site, whose error curves say what a rank loses.
        sites: the decisions to take.
        max_latency_ms: milliseconds of one forward pass, above 0.
        batch: images in one forward pass.
        multiple: the step of ranks.
        deploy: the runtime whose fused attention the ranks must allow; see ``deployment``.
        measure: the clock; tests put a model of cost in its place.
        int8: whether ``quantize`` follows.
    """

    def __init__(self, model: nn.Module, factors: Factors, sites: list[Site], *,
                 max_latency_ms: float, batch: int = 1, multiple: int = MULTIPLE,
                 deploy: str = "any", measure: Measure = measure,
                 int8: bool = False) -> None:
        self.deploy = deploy
        self.factors, self.max_latency_ms, self.multiple = factors, max_latency_ms, multiple
        self.table = LatencyTable(model, sites, batch, multiple, measure, int8)

    def plan(self, weights: ErrorWeights) -> RankPlan:
        """The plan of least weighted error within the budget, or up to 3 % below it where ranks
        allow no more.

        Raises:
            UserError: even the fastest model is too slow; the message names its latency.
        """
        items = [self._candidates(block, weights) for block in self.table.blocks]
        plan, ms, _ = _fitted(items, self.table, self.max_latency_ms)
        LOG.info("%.2f ms of a budget of %g ms; dense %.2f ms", ms, self.max_latency_ms,
                 self.table.dense_ms)
        if ms > self.max_latency_ms:
            warnings.warn(f"the fastest model tried takes {ms:.2f} ms, above "
                          f"{self.max_latency_ms:g} ms; timings vary here, a quieter machine "
                          "would serve better", stacklevel=2)
        return plan

    def _candidates(self, block: TimedBlock, weights: ErrorWeights) -> Candidates:
        """Every combination of the block's ranks that no other beats in both time and error."""
        errors: list[dict[Rank, float]] = [
            {rank: weighted_error(self.factors, weights, site, rank)
             for rank in site.candidates(self.multiple)} for site in block.sites]

        def choice(ranks: tuple[Rank, ...]) -> Choice:
            return Choice(self.table(block, ranks), sum(error[rank] for error, rank in
                                                        zip(errors, ranks, strict=True)))

        combined = [(choice(ranks), ranks) for ranks in product(*errors)
                    if allows(self.deploy, block.sites, ranks)]
        kept = efficient(combined)
        return Candidates(block.sites, [ranks for _, ranks in kept],
                          [choice for choice, _ in kept])


def _fitted(items: list[Candidates], table: LatencyTable, budget: float) -> Measured:
    """The best of the plans measured: the nearest to ``AIM`` of those within ``budget``."""
    aim, target = AIM * budget, AIM * budget
    tried: list[Measured] = []
    for _ in range(MOST_MODELS):
        chosen = choose(items, target - table.fixed_ms) or [0] * len(items)  # else the fastest
        plan = plan_of(items, chosen)
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
    """The sum of parts to ask of the knapsack next, for the model to take ``aim``.

    Between the nearest models on either side of ``aim`` it is interpolated. Where all are on one
    side, the nearest model's target is scaled by what its sum was wrong.
    """
    below = max((known for known in tried if known.ms <= aim), default=None, key=_ms)
    above = min((known for known in tried if known.ms > aim), default=None, key=_ms)
    if below is not None and above is not None:
        share = (aim - below.ms) / (above.ms - below.ms)
        return below.target + share * (above.target - below.target)
    nearest = below if below is not None else above
    assert nearest is not None  # a model was tried
    return nearest.target * aim / nearest.ms


def _ms(known: Measured) -> float:
    return known.ms
