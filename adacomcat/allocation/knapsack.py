"""A multiple-choice knapsack: one choice of every item, the least total error within a budget.

The allocation and the rank search call it. It knows costs and errors, not models.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One candidate of one item: what it costs and how much it hurts."""

    cost: float
    error: float


def knapsack(items: list[list[Choice]], budget: float) -> list[int] | None:
    """One choice per item, least total error within ``budget``; None where nothing fits.

    Takes the steps along the lower convex hulls of all items' (cost, error) curves by error saved
    per unit of cost, largest first (the Lagrangian solution). Then spends the rest on single
    upgrades.
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
    _spend(items, chosen, budget - spent)
    return chosen


def fill(items: list[list[Choice]], chosen: list[int], budget: float) -> None:
    """In place: raise single items to dearer choices while ``budget`` pays for one.

    The upgrade that adds the least error comes first. Ties go to the first item.
    """
    spent = sum(item[i].cost for item, i in zip(items, chosen, strict=True))
    _spend(items, chosen, budget - spent, dearer=True)


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
