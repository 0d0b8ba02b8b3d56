"""A plan and a model → the compressed model."""

from collections.abc import Callable
from itertools import groupby

import torch
from timm.layers import Mlp
from torch import nn

from adacomcat.convert.factors import Factors
from adacomcat.layers.attention import low_rank_class
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import LowRankMlp, mlp_of_width, prune_mlp
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, Site


def build_skeleton(model: nn.Module, plan: RankPlan) -> nn.Module:
    """In place: low-rank modules of the plan's shapes, their factors not yet filled."""
    return _swap(model, plan, lambda module, sites: skeleton_module(module, sites, plan))


@torch.no_grad()
def install_(model: nn.Module, plan: RankPlan, factors: Factors) -> nn.Module:
    """In place: replace what the plan names, with these factors cut to its ranks."""
    return _swap(model, plan, lambda module, sites: low_rank_module(module, sites, plan, factors))


def _swap(model: nn.Module, plan: RankPlan, make: Callable) -> nn.Module:
    for name, group in groupby(plan.validate(model), key=lambda site: site.module):
        sites = list(group)
        if any(plan[site.name] != DENSE for site in sites):
            model.set_submodule(name, make(model.get_submodule(name), sites))
    join_mlps_(model)
    model.rank_plan = plan
    return model


def low_rank_module(module: nn.Module, sites: list[Site], plan: RankPlan,
                    factors: Factors) -> nn.Module:
    """The drop-in for one dense module, filled. ``sites``: those of this module that shrink."""
    if sites[0].kind == "hidden":
        return prune_mlp(module, *factors[sites[0].name].pruned(plan[sites[0].name]))
    replacement = skeleton_module(module, sites, plan)
    if isinstance(replacement, LowRankLinear):
        replacement.set_(factors[sites[0].name])
        return replacement
    prefix = sites[0].module
    if hasattr(replacement, "wq"):
        replacement.set_scores_(factors[f"{prefix}.qk"])
    for part in "qk":
        if isinstance(projection := getattr(replacement, part, None), LowRankLinear):
            projection.set_(factors[f"{prefix}.{part}"])
    replacement.set_values_(factors[f"{prefix}.vo"])
    return replacement


def skeleton_module(module: nn.Module, sites: list[Site], plan: RankPlan) -> nn.Module:
    """The drop-in for one dense module, its factors not yet filled."""
    site, prefix = sites[0], sites[0].module
    if site.kind == "linear":
        return LowRankLinear.like(module, plan[site.name])
    if site.kind == "hidden":
        return mlp_of_width(module, plan[site.name])

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
        low_rank = type(module) is Mlp and all(
            isinstance(part, LowRankLinear) for part in (module.fc1, module.fc2))
        if low_rank and isinstance(module.norm, nn.Identity):
            joined = LowRankMlp(module.fc1, module.act, module.fc2, module.drop1.p)
            model.set_submodule(name, joined.train(module.training))
