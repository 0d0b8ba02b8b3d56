"""What an allocation chooses from: the ranks of sites that are decided together."""

from typing import NamedTuple

from adacomcat.allocation.knapsack import Choice, knapsack
from adacomcat.plan import RankPlan
from adacomcat.sites import Rank, Site


class Candidates(NamedTuple):
    """Combinations of ranks, one for each site, and what each combination costs and loses."""

    sites: tuple[Site, ...]
    ranks: list[tuple[Rank, ...]]
    choices: list[Choice]


def choose(items: list[Candidates], budget: float) -> list[int] | None:
    """The knapsack's choice from each item; None where the cheapest exceed ``budget``."""
    return knapsack([item.choices for item in items], budget)


def plan_of(items: list[Candidates], chosen: list[int]) -> RankPlan:
    """The plan of one combination from each item."""
    return RankPlan({site.name: rank for item, index in zip(items, chosen, strict=True)
                     for site, rank in zip(item.sites, item.ranks[index], strict=True)})
