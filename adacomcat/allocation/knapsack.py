"""Budget → plan, without a search: a multiple-choice knapsack over truncation errors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One candidate of one item: what it costs and how much it hurts."""

    cost: float
    error: float


def knapsack(items: list[list[Choice]], budget: float) -> list[int] | None:
    """One choice per item, least total error within ``budget``; None where nothing fits.

    Walks the lower convex hull of every item's (cost, error) curve in order of error saved per
    cost (the Lagrangian solution), then spends what is left on single upgrades.
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
    _spend_rest(items, chosen, budget - spent)
    return chosen


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


def _spend_rest(items: list[list[Choice]], chosen: list[int], rest: float) -> None:
    while True:
        upgrades = [(items[k][i].error - c.error, k, j)
                    for k, i in enumerate(chosen) for j, c in enumerate(items[k])
                    if c.error < items[k][i].error and c.cost - items[k][i].cost <= rest]
        if not upgrades:
            return
        _, k, j = max(upgrades)
        rest -= items[k][j].cost - items[k][chosen[k]].cost
        chosen[k] = j
