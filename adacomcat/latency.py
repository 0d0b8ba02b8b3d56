"""Measured latency of what ranks decide, and of whole models, on this machine.

What is timed is what one deploys: where our CPU kernels are built, the fused sublayers of
``adacomcat.optimize``; elsewhere the plain modules. Ranks that one op takes together (``qk`` and
``vo`` of an attention, ``fc1`` and ``fc2`` of an MLP) are timed together, on a grid, so nothing is
said of how they interact; between its points the time is multilinear in the ranks.
"""

import copy
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any, NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from adacomcat import backends
from adacomcat.convert import build_skeleton, join_mlps_, skeleton_module
from adacomcat.cost import input_size, interleaved
from adacomcat.fuse import (
    FewRowsLinear,
    FirstTokenVisionTransformer,
    FusedBlock,
    meet_few_rows_,
    optimize,
    sublayer,
)
from adacomcat.latency_cache import LatencyCache, machine
from adacomcat.plan import RankPlan
from adacomcat.progress import progress
from adacomcat.sites import DENSE, Rank, Site

# Ranks timed along each axis, beside 'dense', of a grid with so many axes.
GRID = {1: 8, 2: 4}
GRID_OTHERWISE = 3
SECONDS = 5.0  # enough for one shape
REPEATS = 40


class Timed(NamedTuple):
    """A module, the method of it that is timed, and its arguments."""

    module: nn.Module
    method: str
    args: tuple
    kwargs: dict[str, Any]

    def __call__(self) -> object:
        return getattr(self.module, self.method)(*self.args, **self.kwargs)


# Milliseconds of each; tests put a model of cost in the place of the clock.
Measure = Callable[[Mapping[Hashable, Timed]], dict[Hashable, float]]


def measure(runs: Mapping[Hashable, Timed]) -> dict[Hashable, float]:
    """Median milliseconds, measured in turn. On one thread of a CPU it is that thread's own time:
    while other work holds the core, it stands still."""
    on_cpu = not any(parameter.is_cuda for run in runs.values()
                     for parameter in run.module.parameters())
    alone = on_cpu and torch.get_num_threads() == 1
    return interleaved(runs, REPEATS, SECONDS, time.thread_time if alone else time.perf_counter)


def deployed(model: nn.Module) -> nn.Module:
    """A copy as it runs in the end, whose latency counts."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and backends.available()["cpp"] is None:
        return optimize(model)
    return copy.deepcopy(model).eval()


def model_latencies(models: Mapping[str, nn.Module], batch: int = 1,
                    measure: Measure = measure) -> dict[str, float]:
    """Milliseconds of each model as deployed, for ``batch`` images."""
    return measure({name: forward_pass(deployed(model), batch) for name, model in models.items()})


def forward_pass(model: nn.Module, batch: int) -> Timed:
    images = torch.randn(batch, *input_size(model)).to(next(model.parameters()))
    return Timed(model, "__call__", (images,), {})


@dataclass(frozen=True)
class Unit:
    """Sites that are timed together, since one call runs them."""

    place: str  # of what is called in the deployed model
    method: str
    owner: str  # of what is rebuilt at other ranks: a block that is fused, or the module itself
    module: str  # of the dense module
    sites: tuple[Site, ...]
    few_rows: bool = False  # of a linear layer: whether it runs as one for few rows

    def built(self, model: nn.Module, ranks: Sequence[Rank]) -> nn.Module:
        """What would be called at these ranks, one for each site; weights are arbitrary."""
        plan = RankPlan(dict(zip((site.name for site in self.sites), ranks, strict=True)))
        root = nn.Module()
        root.add_module("owner", copy.deepcopy(model.get_submodule(self.owner)))

        def relative(name: str) -> str:
            return "owner" + name.removeprefix(self.owner)

        for name, group in groupby(self.sites, key=lambda site: site.module):
            sites = list(group)
            if any(plan[site.name] != DENSE for site in sites):
                made = skeleton_module(model.get_submodule(name), sites, plan)
                root.set_submodule(relative(name), made)
        join_mlps_(root)
        if self.few_rows:
            meet_few_rows_(root.owner)
        if self.owner == self.module:
            return root.owner.eval()
        part = self.module.removeprefix(self.owner + ".")
        return sublayer(root.owner.eval(), part).eval()

    def key(self, model: nn.Module, run: Timed, axes: Sequence[Sequence[Rank]]) -> str:
        """The same for all units that take equally long at equal ranks."""
        shapes = [tuple(arg.shape) for arg in (*run.args, *run.kwargs.values())
                  if isinstance(arg, Tensor)]
        decisions = [f"{site.kind}: {site.num_heads} heads, tier {site.tier}"
                     for site in self.sites]
        what = repr(model.get_submodule(self.module))
        ranks = " x ".join(",".join(map(str, axis)) for axis in axes)
        return " ".join(f"{type(run.module).__name__}.{self.method} {shapes} of {what}; "
                        f"{'; '.join(decisions)}; at {ranks}".split())


def find_units(model: nn.Module, runs: nn.Module, sites: list[Site]) -> list[Unit]:
    """The units of ``model``, which runs as ``runs``, in the order of the sites."""
    units: dict[str, Unit] = {}
    for site in sites:
        unit = _unit(model, runs, site)
        found = units.get(unit.place, unit)
        units[unit.place] = unit if found is unit else _joined(found, unit)
    return list(units.values())


def _joined(unit: Unit, other: Unit) -> Unit:
    return Unit(unit.place, unit.method, unit.owner, unit.module, unit.sites + other.sites)


def _unit(model: nn.Module, runs: nn.Module, site: Site) -> Unit:
    module = site.module
    parent = module.rpartition(".")[0]
    if site.kind == "linear" and type(model.get_submodule(parent)) is Mlp:
        module = parent  # its two projections become one op
    parts = module.split(".")
    for depth in range(len(parts)):
        block, part = ".".join(parts[:depth]), parts[depth]
        if type(runs.get_submodule(block)) is FusedBlock:
            return _unit_of_block(runs, block, part, module, site)
    few_rows = type(runs.get_submodule(module)) is FewRowsLinear
    return Unit(module, "forward", module, module, (site,), few_rows)


def _unit_of_block(runs: nn.Module, block: str, part: str, module: str, site: Site) -> Unit:
    whole = f"{block}.{part}"
    if module != whole:  # of a sublayer that stays what it is
        place = f"{whole}.inner.{module.removeprefix(whole + '.')}"
        return Unit(place, "forward", module, module, (site,))
    last = (isinstance(runs, FirstTokenVisionTransformer) and part == "attn"
            and runs.get_submodule(block) is runs.blocks[-1])
    return Unit(whole, "first_token" if last else "forward", block, module, (site,))


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


@torch.inference_mode()
def captured_calls(forward: Timed, units: list[Unit]) -> dict[str, Timed]:
    """Place → how the unit there is called in a forward pass; those never called are left out."""
    calls: dict[str, Timed] = {}
    with _recording(forward.module, units, calls):
        forward()
    return calls


@contextmanager
def _recording(model: nn.Module, units: list[Unit], calls: dict[str, Timed]) -> Iterator[None]:
    """Methods are shadowed on the instance: hooks would not see ``first_token``."""
    def recorder(place: str, module: nn.Module, method: str) -> Callable:
        inner = getattr(module, method)

        def record(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(place, Timed(module, method, args, kwargs))
            return inner(*args, **kwargs)
        return record

    modules = [(model.get_submodule(unit.place), unit) for unit in units]
    for module, unit in modules:
        setattr(module, unit.method, recorder(unit.place, module, unit.method))
    try:
        yield
    finally:
        for module, unit in modules:
            delattr(module, unit.method)

