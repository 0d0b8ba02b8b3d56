"""The latency table of one model: milliseconds of its timed blocks at any ranks.

Every block is timed on a grid of ranks, which the cache keeps. The ranks that one op takes
together, like ``fc1`` and ``fc2`` of an MLP, are the axes of one grid, so that their interaction is
measured and not assumed. Between grid points the time is multilinear in the ranks.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import product

from torch import nn

from adacomcat.convert.install import build_skeleton
from adacomcat.latency.blocks import TimedBlock, captured_calls, find_blocks
from adacomcat.latency.cache import LatencyCache, machine
from adacomcat.latency.timing import Call, Measure, deployed, forward_pass
from adacomcat.plan import RankPlan
from adacomcat.quantization.model import quantized_
from adacomcat.sites import DENSE, Rank, Site
from adacomcat.utils.model import copied
from adacomcat.utils.progress import progress

# Number of axes of a grid → ranks that are timed along each axis, beside 'dense'.
GRID = {1: 8, 2: 4}
GRID_OTHERWISE = 3


class Interpolation:
    """Milliseconds of a timed block at any ranks, from the milliseconds on a grid of ranks.

    Args:
        axes: for each site the ranks on the grid, ascending, with 'dense' as the last.
        grid: ranks of a grid point, joined by commas → milliseconds.
    """

    def __init__(self, axes: list[list[Rank]], grid: dict[str, float]) -> None:
        self.axes, self.grid = axes, grid

    def __call__(self, ranks: Sequence[Rank]) -> float:
        shares = [_shares(axis, rank) for axis, rank in zip(self.axes, ranks, strict=True)]
        return sum(math.prod(share for _, share in corner)
                   * self.grid[_point(knot for knot, _ in corner)]
                   for corner in product(*(axis.items() for axis in shares)))


def _point(ranks: Iterable[Rank]) -> str:
    return ",".join(map(str, ranks))


def _shares(axis: list[Rank], rank: Rank) -> dict[Rank, float]:
    """The knots of ``axis`` around ``rank``, and how much each counts; 'dense' is a knot."""
    if rank == DENSE or rank in axis:
        return {rank: 1.0}
    knots = [knot for knot in axis if knot != DENSE]
    below = max(knot for knot in knots if knot < rank)
    above = min(knot for knot in knots if knot > rank)
    share = (rank - below) / (above - below)
    return {below: 1 - share, above: share}


def axis_knots(site: Site, count: int, multiple: int) -> list[Rank]:
    """At most ``count`` of the site's candidates, with the first and the last, and then DENSE."""
    ranks: Sequence[Rank] = site.candidates(multiple)[:-1]
    if len(ranks) > count:
        ranks = [ranks[round(i * (len(ranks) - 1) / (count - 1))] for i in range(count)]
    return [*ranks, DENSE]


class LatencyTable:
    """Measured milliseconds of every timed block at any ranks, of the dense model and of others.

    Blocks of equal shape share one measurement.

    Args:
        model: the dense model.
        sites: the decisions to take.
        batch: images in one forward pass.
        multiple: the step of ranks.
        measure: the clock.
        int8: whether ``quantize`` follows, so that layers are timed on int8.
    """

    def __init__(self, model: nn.Module, sites: list[Site], batch: int, multiple: int,
                 measure: Measure, int8: bool = False) -> None:
        self.model, self.batch, self.measure, self.int8 = model, batch, measure, int8
        dense = self._deployed(copied(model))
        self.dense = forward_pass(dense, batch)
        found = find_blocks(model, dense, sites)
        calls = captured_calls(self.dense, found)
        self.blocks = [block for block in found if block.place in calls]
        cache = LatencyCache(machine(model))
        self.interpolations = {
            block.place: self._interpolation(block, calls[block.place], multiple, cache)
            for block in progress(self.blocks, "timing")}
        self.dense_ms = measure({"dense": self.dense})["dense"]
        decided = sum(self(block, [DENSE for _ in block.sites]) for block in self.blocks)
        # What no rank changes, like the patch embedding.
        self.fixed_ms = max(0.0, self.dense_ms - decided)

    def __call__(self, block: TimedBlock, ranks: Sequence[Rank]) -> float:
        return self.interpolations[block.place](ranks)

    def _interpolation(self, block: TimedBlock, call: Call, multiple: int,
                       cache: LatencyCache) -> Interpolation:
        count = GRID.get(len(block.sites), GRID_OTHERWISE)
        axes = [axis_knots(site, count, multiple) for site in block.sites]
        key = block.key(self.model, call, axes)
        points = {_point(ranks): ranks for ranks in product(*axes)}
        grid = cache.milliseconds.get(key, {})
        if grid.keys() != points.keys():
            grid = self.measure({point: call._replace(module=block.built(self.model, ranks))
                                 for point, ranks in points.items()})
            cache.add(key, grid)
        return Interpolation(axes, grid)

    def plan_ms(self, plan: RankPlan) -> float:
        """Measured milliseconds of the whole model at ``plan``; its weights do not matter.

        The dense model runs in turn with it, and their ratio counts, because a machine that is
        slower for a while slows down both.
        """
        made = self._deployed(build_skeleton(copied(self.model), plan))
        times = self.measure({"dense": self.dense, "plan": forward_pass(made, self.batch)})
        return self.dense_ms * times["plan"] / times["dense"]

    def _deployed(self, model: nn.Module) -> nn.Module:
        """``model``, which may be changed, as it runs in the end."""
        return deployed(quantized_(model, None, {"": 8}) if self.int8 else model)
