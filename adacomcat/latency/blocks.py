"""Timed blocks: the parts of a deployed model whose latency depends on ranks.

A timed block is what one call runs, and that is what a deployed model has: the fused sublayers of
``adacomcat.optimize`` where the CPU kernels are built, elsewhere the plain modules. So ``qk`` and
``vo`` of an attention, or ``fc1`` and ``fc2`` of an MLP, are timed together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from adacomcat.convert.install import join_mlps_, skeleton_module
from adacomcat.convert.quantized import is_quantized
from adacomcat.fuse import FusedBlock, sublayer
from adacomcat.latency.timing import Call
from adacomcat.layers.fused import ClassTokenEncoder, GemvLinear, gemv_linear
from adacomcat.layers.packed import PackedModule
from adacomcat.layers.registry import mlp_parts
from adacomcat.plan import RankPlan
from adacomcat.quantization.model import int8_form_
from adacomcat.sites import DENSE, Rank, Site
from adacomcat.utils.model import copied, replace_


@dataclass(frozen=True)
class TimedBlock:
    """Sites that are timed together, because one call runs them."""

    place: str  # name of the module that is called in the deployed model
    method: str  # name of the method that is called
    owner: str  # name of what is rebuilt at other ranks: a transformer block, or the module itself
    module: str  # name of the dense module
    sites: tuple[Site, ...]
    gemv: bool = False  # whether the layer is deployed as a GemvLinear
    packed: bool = False  # whether its weights are deployed packed
    int8: bool = False  # whether it is deployed on int8

    def built(self, model: nn.Module, ranks: Sequence[Rank]) -> nn.Module:
        """The module that would be called at these ranks, one rank for each site.

        Its weights are arbitrary.
        """
        plan = RankPlan(dict(zip((site.name for site in self.sites), ranks, strict=True)))
        root: Any = nn.Module()
        root.add_module("owner", copied(model.get_submodule(self.owner)))

        def relative(name: str) -> str:
            return "owner" + name.removeprefix(self.owner)

        for name, group in groupby(self.sites, key=lambda site: site.module):
            sites = list(group)
            if any(plan[site.name] != DENSE for site in sites):
                made = skeleton_module(model.get_submodule(name), sites, plan)
                replace_(root, relative(name), made)
        join_mlps_(root)
        if self.int8:
            int8_form_(root)
        if self.gemv:
            root.owner = gemv_linear(root.owner)
        if self.owner == self.module:
            return root.owner.eval()
        part = self.module.removeprefix(self.owner + ".")
        made = sublayer(root.owner.eval(), part).eval()
        if self.packed and isinstance(made, PackedModule):
            made.pack_()
        return made

    def key(self, model: nn.Module, call: Call, axes: Sequence[Sequence[Rank]]) -> str:
        """The same for all blocks that take equally long at equal ranks."""
        shapes = [tuple(arg.shape) for arg in (*call.args, *call.kwargs.values())
                  if isinstance(arg, Tensor)]
        decisions = [f"{site.kind}: {site.num_heads} heads, tier {site.tier}"
                     for site in self.sites]
        what = repr(model.get_submodule(self.module)) + " on int8" * self.int8
        ranks = " x ".join(",".join(map(str, axis)) for axis in axes)
        return " ".join(f"{type(call.module).__name__}.{self.method} {shapes} of {what}; "
                        f"{'; '.join(decisions)}; at {ranks}".split())


def find_blocks(model: nn.Module, runs: nn.Module, sites: list[Site]) -> list[TimedBlock]:
    """The timed blocks of ``model``, which is deployed as ``runs``, in the order of the sites."""
    blocks: dict[str, TimedBlock] = {}
    for site in sites:
        block = _block(model, runs, site)
        found = blocks.get(block.place)
        if found is not None:
            block = replace(found, sites=found.sites + block.sites, gemv=False)
        elif is_quantized(runs.get_submodule(block.place)):
            # Of the last block, too, ``optimize`` packs an MLP on int8.
            block = replace(block, int8=True, packed=block.method == "forward")
        blocks[block.place] = block
    return list(blocks.values())


def _block(model: nn.Module, runs: nn.Module, site: Site) -> TimedBlock:
    """The timed block that runs ``site``, with no other site yet."""
    module = site.module
    parent = module.rpartition(".")[0]
    if site.kind == "linear" and mlp_parts(model.get_submodule(parent)) is not None:
        module = parent  # its two projections become one op
    parts = module.split(".")
    for depth in range(len(parts)):
        block, part = ".".join(parts[:depth]), parts[depth]
        if isinstance(runs.get_submodule(block), FusedBlock):
            return _sublayer(runs, block, part, module, site)
    gemv = type(runs.get_submodule(module)) is GemvLinear
    return TimedBlock(module, "forward", module, module, (site,), gemv)


def _sublayer(runs: Any, block: str, part: str, module: str, site: Site) -> TimedBlock:
    """The timed block for a site inside ``part`` ('attn' or 'mlp') of a fused ``block``."""
    whole = f"{block}.{part}"
    if module != whole:  # a part of a sublayer that stays what it is
        place = f"{whole}.inner.{module.removeprefix(whole + '.')}"
        return TimedBlock(place, "forward", module, module, (site,))
    last = isinstance(runs, ClassTokenEncoder) and runs.get_submodule(block) is runs.blocks[-1]
    return TimedBlock(whole, "class_token" if last and part == "attn" else "forward", block,
                      module, (site,), packed=not last)


@torch.inference_mode()
def captured_calls(forward: Call, blocks: list[TimedBlock]) -> dict[str, Call]:
    """Place → the first call of the block there in a forward pass; blocks never called are absent.
    """
    calls: dict[str, Call] = {}
    with _recording(forward.module, blocks, calls):
        forward()
    return calls


@contextmanager
def _recording(model: nn.Module, blocks: list[TimedBlock],
               calls: dict[str, Call]) -> Iterator[None]:
    """Inside, the first call of every block is noted in ``calls``.

    Methods are shadowed on the instance, for hooks would not see ``class_token``.
    """
    def recorder(place: str, module: nn.Module, method: str) -> Callable:
        inner = getattr(module, method)

        def record(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(place, Call(module, method, args, kwargs))
            return inner(*args, **kwargs)
        return record

    modules = [(model.get_submodule(block.place), block) for block in blocks]
    for module, block in modules:
        setattr(module, block.method, recorder(block.place, module, block.method))
    try:
        yield
    finally:
        for module, block in modules:
            delattr(module, block.method)
