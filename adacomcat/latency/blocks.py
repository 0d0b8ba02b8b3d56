"""Measured latency of what ranks decide, and of whole models, on this machine.

What is timed is what one deploys: where our CPU kernels are built, the fused sublayers of
``adacomcat.optimize``; elsewhere the plain modules. Ranks that one op takes together (``qk`` and
``vo`` of an attention, ``fc1`` and ``fc2`` of an MLP) are timed together, on a grid, so nothing is
said of how they interact; between its points the time is multilinear in the ranks.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from adacomcat.convert.install import join_mlps_, skeleton_module
from adacomcat.fuse import FusedBlock, sublayer
from adacomcat.latency.timing import Timed
from adacomcat.layers.fused import ClassTokenEncoder, GemvLinear, gemv_linear
from adacomcat.layers.registry import mlp_parts
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, Rank, Site


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
            root.owner = gemv_linear(root.owner)
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
    if site.kind == "linear" and mlp_parts(model.get_submodule(parent)) is not None:
        module = parent  # its two projections become one op
    parts = module.split(".")
    for depth in range(len(parts)):
        block, part = ".".join(parts[:depth]), parts[depth]
        if type(runs.get_submodule(block)) is FusedBlock:
            return _unit_of_block(runs, block, part, module, site)
    few_rows = type(runs.get_submodule(module)) is GemvLinear
    return Unit(module, "forward", module, module, (site,), few_rows)


def _unit_of_block(runs: nn.Module, block: str, part: str, module: str, site: Site) -> Unit:
    whole = f"{block}.{part}"
    if module != whole:  # of a sublayer that stays what it is
        place = f"{whole}.inner.{module.removeprefix(whole + '.')}"
        return Unit(place, "forward", module, module, (site,))
    last = (isinstance(runs, ClassTokenEncoder) and part == "attn"
            and runs.get_submodule(block) is runs.blocks[-1])
    return Unit(whole, "class_token" if last else "forward", block, module, (site,))


@torch.inference_mode()
def captured_calls(forward: Timed, units: list[Unit]) -> dict[str, Timed]:
    """Place → how the unit there is called in a forward pass; those never called are left out."""
    calls: dict[str, Timed] = {}
    with _recording(forward.module, units, calls):
        forward()
    return calls


@contextmanager
def _recording(model: nn.Module, units: list[Unit], calls: dict[str, Timed]) -> Iterator[None]:
    """Methods are shadowed on the instance: hooks would not see ``class_token``."""
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
