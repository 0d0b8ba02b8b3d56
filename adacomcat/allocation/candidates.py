"""What an allocation chooses from: the ranks, and the bits, of sites that are decided together."""

from typing import NamedTuple, TypeVar

from adacomcat.allocation.knapsack import Choice, knapsack
from adacomcat.plan import RankPlan
from adacomcat.sites import Rank, Site


class Candidates(NamedTuple):
    """Combinations of ranks, one for each site, and what each combination costs and loses."""

    sites: tuple[Site, ...]
    ranks: list[tuple[Rank, ...]]
    choices: list[Choice]
    place: str = ""  # of the sites: an attention, an MLP or a layer, where bits are chosen too
    bits: tuple[int | None, ...] = ()  # of each combination; None: floats


def choose(items: list[Candidates], budget: float) -> list[int] | None:
    """The knapsack's choice from each item; None where the cheapest exceed ``budget``."""
    return knapsack([item.choices for item in items], budget)


def plan_of(items: list[Candidates], chosen: list[int]) -> RankPlan:
    """The plan of one combination from each item."""
    taken = list(zip(items, chosen, strict=True))
    bits = {item.place: item.bits[index] for item, index in taken if item.bits}
    return RankPlan({site.name: rank for item, index in taken
                     for site, rank in zip(item.sites, item.ranks[index], strict=True)},
                    {place: number for place, number in bits.items() if number is not None})


Option = TypeVar("Option")


def efficient(options: list[tuple[Choice, Option]]) -> list[tuple[Choice, Option]]:
    """Those that no other one beats in both cost and error, the cheapest first."""
    ordered = sorted(options, key=lambda pair: (pair[0].cost, pair[0].error))
    kept = ordered[:1]
    for pair in ordered[1:]:
        if pair[0].error < kept[-1][0].error:
            kept.append(pair)
    return kept
