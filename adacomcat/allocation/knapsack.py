"""A multiple-choice knapsack: one choice of every item, the least total error within a budget.

The allocation and the rank search call it. It knows costs and errors, not models.

It is solved exactly, in two steps. The Lagrangian relaxation puts a price λ on cost: a choice then
adds e + λ c, and Σ min (e + λ c) - λ budget is a lower bound of every solution. Steps along the
convex hulls, then single upgrades, give a first solution above it. What lies between the two is the
gap. A choice whose e + λ c exceeds the least of its item by more than the gap is in no better
solution, which leaves few choices. A dynamic programme over the efficient pairs (cost, error) goes
through these (Pisinger, European Journal of Operational Research 83, 1995).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# The most pairs that the programme keeps after one item. Costs of models need some thousands; where
# there are more, those of the largest bounds go, and the solution may then miss the least error.
MOST_PAIRS = 200_000
# Differences below this part of the sums are rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Choice:
    """One candidate of one item: what it costs and how much it hurts."""

    cost: float
    error: float


def knapsack(items: list[list[Choice]], budget: float) -> list[int] | None:
    """One choice per item, least total error within ``budget``; None where nothing fits."""
    chosen = [min(range(len(item)), key=lambda i: (item[i].cost, item[i].error))
              for item in items]
    if _total(items, chosen) > budget:
        return None
    price = _climb(items, chosen, budget)
    _spend(items, chosen, budget - _total(items, chosen))
    if not price:
        return chosen
    better = _programme(items, chosen, budget, price)
    return chosen if better is None or _total(items, better) > budget else better


def fill(items: list[list[Choice]], chosen: list[int], budget: float) -> None:
    """In place: raise single items to dearer choices while ``budget`` pays for one.

    The upgrade that adds the least error comes first. Ties go to the first item.
    """
    _spend(items, chosen, budget - _total(items, chosen), dearer=True)


def _total(items: list[list[Choice]], chosen: list[int]) -> float:
    return sum(item[i].cost for item, i in zip(items, chosen, strict=True))


def _climb(items: list[list[Choice]], chosen: list[int], budget: float) -> float:
    """In place: take steps along the lower convex hulls, those that save most per cost first.

    Returns:
        The price λ: what the first step that did not fit saves per cost; 0 where all fitted.
    """
    steps = [(slope, k, i, j) for k, item in enumerate(items)
             for slope, i, j in _hull_steps(item, chosen[k])]
    spent, price = _total(items, chosen), 0.0
    blocked: set[int] = set()
    for slope, k, i, j in sorted(steps, key=lambda step: -step[0]):
        extra = items[k][j].cost - items[k][i].cost
        if k in blocked or spent + extra > budget:
            blocked.add(k)
            price = price or slope
        else:
            chosen[k], spent = j, spent + extra
    return price


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


def _spend(items: list[list[Choice]], chosen: list[int], rest: float, *,
           dearer: bool = False) -> None:
    """In place: take upgrades of single items while ``rest`` pays for one, the best one first.

    An upgrade is a choice of smaller error, or with ``dearer`` any choice of higher cost. The one
    that saves the most error (absolute, not per cost) is taken. Ties go to the last item, with
    ``dearer`` to the first. Equal layers tie often, so both rules are kept: another rule would
    give models other plans.
    """
    order = -1 if dearer else 1
    while True:
        upgrades = [(items[k][i].error - c.error, order * k, order * j)
                    for k, i in enumerate(chosen) for j, c in enumerate(items[k])
                    if c.cost - items[k][i].cost <= rest
                    and (c.cost > items[k][i].cost if dearer else c.error < items[k][i].error)]
        if not upgrades:
            return
        _, k, j = max(upgrades)
        k, j = order * k, order * j
        rest -= items[k][j].cost - items[k][chosen[k]].cost
        chosen[k] = j


class _Open(NamedTuple):
    """The choices of one item that a better solution may hold."""

    index: np.ndarray  # (n,) places in the item
    cost: np.ndarray  # (n,)
    excess: np.ndarray  # (n,) of e + λ c over the least of the item


def _programme(items: list[list[Choice]], chosen: list[int], budget: float,
               price: float) -> list[int] | None:
    """The solution of least error, if it is below that of ``chosen``."""
    costs = [np.array([choice.cost for choice in item], float) for item in items]
    errors = [np.array([choice.error for choice in item], float) for item in items]
    priced = [error + price * cost for error, cost in zip(errors, costs, strict=True)]
    least = [float(values.min()) for values in priced]
    known = sum(float(error[i]) for error, i in zip(errors, chosen, strict=True))
    bound = sum(least) - price * budget
    rounding = ROUNDING * (abs(known) + sum(map(abs, least)) + price * abs(budget))
    gap = known - bound
    if gap <= rounding:
        return None
    reduced = []
    for cost, values, floor in zip(costs, priced, least, strict=True):
        index = np.flatnonzero(values - floor <= gap)
        reduced.append(_Open(index, cost[index], values[index] - floor))
    return _efficient_paths(reduced, budget, price, gap - rounding)


def _efficient_paths(reduced: list[_Open], budget: float, price: float,
                     gap: float) -> list[int] | None:
    """Pairs (cost, excess) item by item: those that fit, that can beat ``gap``, and that no other
    pair beats in both cost and error. Items with the widest costs come first."""
    order = sorted(range(len(reduced)), key=lambda k: -float(np.ptp(reduced[k].cost)))
    least_rest = sum(float(item.cost.min()) for item in reduced)
    most_rest = sum(float(item.cost.max()) for item in reduced)
    cost, excess = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for k in order:
        item = reduced[k]
        least_rest -= float(item.cost.min())
        most_rest -= float(item.cost.max())
        sums = (cost[:, None] + item.cost).ravel()
        above = (excess[:, None] + item.excess).ravel()
        best = above + price * np.maximum(0.0, budget - sums - most_rest)
        places = np.flatnonzero((sums + least_rest <= budget) & (best < gap))
        if not len(places):
            return None
        if len(places) > MOST_PAIRS:
            places = places[np.argsort(best[places], kind="stable")[:MOST_PAIRS]]
        places = _undominated(places, sums[places], above[places] - price * sums[places])
        cost, excess = sums[places], above[places]
        trail.append(np.divmod(places, len(item.cost)))
    place = int(np.argmin(excess - price * cost))
    found = [0] * len(reduced)
    for k, (before, choice) in zip(reversed(order), reversed(trail), strict=True):
        found[k] = int(reduced[k].index[choice[place]])
        place = int(before[place])
    return found


def _undominated(places: np.ndarray, costs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Those of ``places`` whose error is below that of all cheaper ones, the cheapest first."""
    order = np.lexsort((errors, costs))
    errors = errors[order]
    before = np.minimum.accumulate(np.concatenate([[np.inf], errors[:-1]]))
    return places[order[errors < before]]
