"""A fraction of the parameters or multiply-accumulates → a plan, by one knapsack."""

from itertools import product
from typing import Protocol

from torch import nn

from adacomcat.allocation.candidates import Candidates, choose, plan_of
from adacomcat.allocation.deployment import allows, decided_together
from adacomcat.allocation.knapsack import Choice
from adacomcat.allocation.sensitivity import ErrorWeights, weighted_error
from adacomcat.convert.factors import Factors
from adacomcat.cost import model_params, site_macs, work
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, MULTIPLE, Rank, Site


class Cost(Protocol):
    """What one site costs at one rank."""

    def __call__(self, site: Site, rank: Rank, /) -> float: ...


def parameter_cost(model: nn.Module, sites: list[Site]) -> tuple[Cost, float]:
    """(parameters of a site at a rank, parameters of the dense model)."""
    return (lambda site, rank: site.params(rank)), model_params(model)


def mac_cost(model: nn.Module, sites: list[Site]) -> tuple[Cost, float]:
    """(multiply-accumulates of a site for one image, those of the dense model)."""
    macs, tokens = work(model, (site.module for site in sites))
    return (lambda site, rank: site_macs(site, rank, tokens)), macs


class FractionAllocator:
    """Plans that keep at most a fraction of what the whole dense model costs.

    Args:
        sites: the decisions to take.
        factors: factors of every site, whose error curves say what a rank loses.
        cost: what a site costs at a rank.
        whole: what the dense model costs.
        keep: the fraction of ``whole`` to keep.
        multiple: the step of ranks, halved where ``keep`` cannot be reached otherwise.
        deploy: the runtime whose fused attention the ranks must allow; see ``deployment``.
    """

    def __init__(self, sites: list[Site], factors: Factors, cost: Cost, whole: float, *,
                 keep: float, multiple: int = MULTIPLE, deploy: str = "any") -> None:
        self.sites, self.factors, self.cost = sites, factors, cost
        self.keep, self.whole, self.multiple = keep, whole, multiple
        self.deploy = deploy
        self.fixed = whole - sum(cost(site, DENSE) for site in sites)

    def plan(self, weights: ErrorWeights) -> RankPlan:
        """The plan of least weighted error within the budget.

        Raises:
            UserError: no ranks cost as little; the message names the least fraction.
        """
        step = self.multiple
        while True:
            items = self.items(weights, step)
            chosen = choose(items, self.keep * self.whole - self.fixed)
            if chosen is not None:
                return plan_of(items, chosen)
            if step == 1:
                raise UserError(f"keep {self.keep:g} is below what is reachable here; the least "
                                f"is {self._least(items):.4f}")
            step //= 2

    def items(self, weights: ErrorWeights, step: int) -> list[Candidates]:
        """What the knapsack chooses from, ranks in steps of ``step``."""
        return [self.candidates(group, weights, step)
                for group in decided_together(self.deploy, self.sites)]

    def candidates(self, sites: tuple[Site, ...], weights: ErrorWeights,
                   step: int) -> Candidates:
        """The ranks of sites that are decided together, in steps of ``step``."""
        ranks = [combined for combined in product(*(site.candidates(step) for site in sites))
                 if allows(self.deploy, sites, combined)]
        return Candidates(sites, ranks, [self._choice(sites, weights, combined)
                                         for combined in ranks])

    def _choice(self, sites: tuple[Site, ...], weights: ErrorWeights,
                ranks: tuple[Rank, ...]) -> Choice:
        pairs = list(zip(sites, ranks, strict=True))
        return Choice(sum(self.cost(site, rank) for site, rank in pairs),
                      sum(weighted_error(self.factors, weights, site, rank)
                          for site, rank in pairs))

    def _least(self, items: list[Candidates]) -> float:
        cheapest = sum(min(choice.cost for choice in item.choices) for item in items)
        return (self.fixed + cheapest) / self.whole
