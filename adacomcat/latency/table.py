"""Measured latency of what ranks decide, and of whole models, on this machine.

What is timed is what one deploys: where our CPU kernels are built, the fused sublayers of
``adacomcat.optimize``; elsewhere the plain modules. Ranks that one op takes together (``qk`` and
``vo`` of an attention, ``fc1`` and ``fc2`` of an MLP) are timed together, on a grid, so nothing is
said of how they interact; between its points the time is multilinear in the ranks.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import product

from torch import nn

from adacomcat.convert.install import build_skeleton
from adacomcat.latency.blocks import Unit, captured_calls, find_units
from adacomcat.latency.cache import LatencyCache, machine
from adacomcat.latency.timing import Measure, Timed, deployed, forward_pass
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, Rank, Site
from adacomcat.utils.progress import progress

# Ranks timed along each axis, beside 'dense', of a grid with so many axes.
GRID = {1: 8, 2: 4}
GRID_OTHERWISE = 3


class Curve:
    """Milliseconds of a unit at any ranks, from those on a grid."""

    def __init__(self, axes: list[list[Rank]], grid: dict[str, float]) -> None:
        self.axes, self.grid = axes, grid

    def __call__(self, ranks: Sequence[Rank]) -> float:
        weights = [_weights(axis, rank) for axis, rank in zip(self.axes, ranks, strict=True)]
        return sum(math.prod(weight for _, weight in corner)
                   * self.grid[_point(knot for knot, _ in corner)]
                   for corner in product(*(axis.items() for axis in weights)))


def _point(ranks: Iterable[Rank]) -> str:
    return ",".join(map(str, ranks))


def _weights(axis: list[Rank], rank: Rank) -> dict[Rank, float]:
    """Linear interpolation of ``rank`` between the knots of ``axis``; 'dense' is one of them."""
    if rank in axis:
        return {rank: 1.0}
    knots = [knot for knot in axis if knot != DENSE]
    below = max(knot for knot in knots if knot < rank)
    above = min(knot for knot in knots if knot > rank)
    share = (rank - below) / (above - below)
    return {below: 1 - share, above: share}


def axis_knots(site: Site, count: int, multiple: int) -> list[Rank]:
    """At most ``count`` of the site's candidates, the first and the last among them, and DENSE."""
    *ranks, _ = site.candidates(multiple)
    if len(ranks) > count:
        ranks = [ranks[round(i * (len(ranks) - 1) / (count - 1))] for i in range(count)]
    return [*ranks, DENSE]


class LatencyTable:
    """Measured milliseconds of every unit at any ranks, of the dense model, and of other models.

    Units of equal shape share one measurement, which the cache keeps.
    """

    def __init__(self, model: nn.Module, sites: list[Site], batch: int, multiple: int,
                 measure: Measure) -> None:
        self.model, self.batch, self.measure = model, batch, measure
        dense = deployed(model)
        self.dense = forward_pass(dense, batch)
        self.units = find_units(model, dense, sites)
        calls = captured_calls(self.dense, self.units)
        self.units = [unit for unit in self.units if unit.place in calls]
        cache = LatencyCache(machine(model))
        self.curves = {unit.place: self._curve(unit, calls[unit.place], multiple, cache)
                       for unit in progress(self.units, "timing")}
        self.dense_ms = measure({"dense": self.dense})["dense"]
        decided = sum(self(unit, [DENSE] * len(unit.sites)) for unit in self.units)
        self.fixed_ms = max(0.0, self.dense_ms - decided)

    def __call__(self, unit: Unit, ranks: Sequence[Rank]) -> float:
        return self.curves[unit.place](ranks)

    def _curve(self, unit: Unit, run: Timed, multiple: int, cache: LatencyCache) -> Curve:
        count = GRID.get(len(unit.sites), GRID_OTHERWISE)
        axes = [axis_knots(site, count, multiple) for site in unit.sites]
        key = unit.key(self.model, run, axes)
        points = {_point(ranks): ranks for ranks in product(*axes)}
        grid = cache.milliseconds.get(key, {})
        if grid.keys() != points.keys():
            grid = self.measure({point: run._replace(module=unit.built(self.model, ranks))
                                 for point, ranks in points.items()})
            cache.add(key, grid)
        return Curve(axes, grid)

    def plan_ms(self, plan: RankPlan) -> float:
        """Measured, of the whole model at ``plan``; its weights do not matter.

        The dense model runs in turn with it, and their ratio counts: a machine that is slower for
        a while slows down both.
        """
        made = deployed(build_skeleton(copy.deepcopy(self.model), plan))
        times = self.measure({"dense": self.dense, "plan": forward_pass(made, self.batch)})
        return self.dense_ms * times["plan"] / times["dense"]
