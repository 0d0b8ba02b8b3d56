"""Replaces each module that a plan names by its low-rank drop-in, empty or filled with factors.

Compression, the latency table and the timm entry point call it. Afterwards ``model.rank_plan`` is
the plan, with what an earlier compression wrote.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn

from adacomcat.convert.factors import Factors
from adacomcat.convert.record import compression_of, merged, record_
from adacomcat.layers.attention import low_rank_class
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import LowRankMlp, mlp_of_width, prune_mlp
from adacomcat.layers.registry import mlp_parts
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, Site
from adacomcat.utils.model import replace_


def build_skeleton(model: nn.Module, plan: RankPlan) -> nn.Module:
    """In place: low-rank modules of the plan's shapes, their factors not yet filled.

    Heads may be wider than the dense ones, as merged adapters make them.
    """
    return _swap(model, plan, lambda module, sites: skeleton_module(module, sites, plan),
                 widened=True)


@torch.no_grad()
def install_(model: nn.Module, plan: RankPlan, factors: Factors) -> nn.Module:
    """In place: replace what the plan names, with these factors cut to its ranks."""
    return _swap(model, plan, lambda module, sites: low_rank_module(module, sites, plan, factors))


def _swap(model: nn.Module, plan: RankPlan,
          make: Callable[[nn.Module, list[Site]], nn.Module], widened: bool = False) -> nn.Module:
    for name, group in groupby(plan.validate(model, widened), key=lambda site: site.module):
        sites = list(group)
        if any(plan[site.name] != DENSE for site in sites):
            replace_(model, name, make(model.get_submodule(name), sites))
    join_mlps_(model)
    record_(model, plan=merged(compression_of(model).ranks, plan))
    return model


def low_rank_module(module: nn.Module, sites: list[Site], plan: RankPlan,
                    factors: Factors) -> nn.Module:
    """The drop-in for one dense module, filled.

    ``sites``: sites of this module; the plan shrinks at least one of them.
    """
    # Cast to Any: `site.kind` determines the classes of the factors and of the module.
    found = cast(dict[str, Any], factors)
    if sites[0].kind == "hidden":
        return prune_mlp(cast(Any, module), *found[sites[0].name].pruned(plan[sites[0].name]))
    replacement: Any = skeleton_module(module, sites, plan)
    if isinstance(replacement, LowRankLinear):
        replacement.set_(found[sites[0].name])
        return replacement
    prefix = sites[0].module
    if hasattr(replacement, "wq"):
        replacement.set_scores_(found[f"{prefix}.qk"])
    for part in "qk":
        if isinstance(projection := getattr(replacement, part, None), LowRankLinear):
            projection.set_(found[f"{prefix}.{part}"])
    replacement.set_values_(found[f"{prefix}.vo"])
    return replacement


def skeleton_module(module: nn.Module, sites: list[Site], plan: RankPlan) -> nn.Module:
    """The drop-in for one dense module, its factors not yet filled."""
    site, prefix = sites[0], sites[0].module
    found: Any = module  # `site.kind` determines the class
    rank = plan[site.name]
    if rank != DENSE and site.kind == "linear":
        return LowRankLinear.like(found, rank)
    if rank != DENSE and site.kind == "hidden":
        return mlp_of_width(found, rank)

    def folded(part: str) -> int:
        rank = plan[f"{prefix}.{part}"]
        return site.head_dim if rank == DENSE else rank

    attention = low_rank_class(module, site.tier).like(module, folded("qk"), folded("vo"))
    for part in "qk":
        rank = plan[f"{prefix}.{part}"]
        if site.tier == "B" and rank != DENSE:
            setattr(attention, part, LowRankLinear.like(getattr(attention, part), rank))
    return attention


def join_mlps_(model: nn.Module) -> None:
    """An MLP whose two projections are low-rank runs as one op."""
    for name, module in list(model.named_modules()):
        parts = mlp_parts(module)
        if parts is None or not parts.plain or parts.names != ("fc1", "fc2") or not name:
            continue
        fc1, fc2 = parts.fc1, parts.fc2
        if type(fc1) is LowRankLinear and type(fc2) is LowRankLinear:
            joined = LowRankMlp(fc1, parts.act, fc2, parts.drop)
            replace_(model, name, joined.train(module.training))
