"""Adapters of a whole model: add them, weigh them, merge them, take them away."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adacomcat.convert.record import compression_of, merged, record_
from adacomcat.customize.adapter import Adapter, AdapterStack
from adacomcat.customize.places import (
    adapt_,
    adapts_queries,
    can_merge,
    heads_of,
    low_rank_sites,
    merge_at_,
    places_in,
    projections_of,
    restore_,
    stack_of,
)
from adacomcat.customize.vit import classifier_of
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import Rank
from adacomcat.utils.limits import INITS
from adacomcat.utils.random import derived_generator

DEFAULT = "default"  # an adapter's name


def denoiser(target: Any) -> nn.Module:
    """The U-Net or transformer of a diffusers pipeline; a module, like a ViT, is taken as it is.

    Raises:
        UserError: it is neither.
    """
    for name in ("unet", "transformer"):
        found = getattr(target, name, None)
        if not isinstance(target, nn.Module) and isinstance(found, nn.Module):
            return found
    if not isinstance(target, nn.Module):
        raise UserError("adapters need a diffusers pipeline with a U-Net or transformer, or such a "
                        f"module; got {type(target).__name__}")
    return target


def attentions(target: Any, targets: Sequence[str] = ("*",)) -> dict[str, Any]:
    """Name → attention, of those that adapters can stand beside and a glob of ``targets`` names.

    Raises:
        UserError: there is none.
    """
    found = {name: module for name, module in places_in(denoiser(target)).items()
             if any(fnmatch.fnmatch(name, glob) for glob in targets)}
    if not found:
        raise UserError(f"no attention of {type(denoiser(target)).__name__} takes adapters under "
                        f"the names {', '.join(targets)}; docs/customize.md lists what is "
                        "supported")
    return found


def processors(target: Any) -> dict[str, AdapterStack]:
    """Name of an attention → its adapters, where it has any."""
    found = ((name, stack_of(module)) for name, module in denoiser(target).named_modules())
    return {name: stack for name, stack in found if stack is not None}


def adapters_of(target: Any, name: str = DEFAULT) -> dict[str, Adapter]:
    """'ATTENTION.KIND-OF-TOKENS' → the factors of the adapter ``name`` there.

    Raises:
        UserError: the model has no such adapter.
    """
    found = {f"{place}.{tokens}": processor.of(name, tokens)
             for place, processor in processors(target).items() if name in processor.alphas
             for tokens in projections_of(denoiser(target).get_submodule(place))}
    if not found:
        known = sorted({known for one in processors(target).values() for known in one.alphas})
        raise UserError(f"the model has no adapter {name!r}; its adapters are: "
                        f"{', '.join(known) or 'none'}")
    return found


def adapter_parameters(target: Any, name: str = DEFAULT) -> list[nn.Parameter]:
    """The numbers to train."""
    return [p for adapter in adapters_of(target, name).values() for p in adapter.parameters()]


def add_adapters(target: Any, rank: int = 2, targets: Sequence[str] = ("*",), *,
                 name: str = DEFAULT, init: str = "zero", seed: int = 0) -> list[str]:
    """Put an adapter beside the attentions of a model, and freeze the model itself.

    Args:
        target: a diffusers pipeline, its U-Net or its transformer; or a ViT, whose classifier
            stays trainable.
        rank: the columns that each head gets.
        targets: globs that name attentions, like '*.attn2' for those that see the prompt.
        name: of the adapter; a model can have several.
        init: 'zero' computes what the model computes; 'linear' is the published start, where all
            factors are drawn like weights of nn.Linear.
        seed: of the factors.

    Returns:
        The names of the attentions.

    Raises:
        UserError: no attention is supported, or the adapter is there already.
    """
    require_rank(rank)
    if init not in INITS:
        raise UserError(f"unknown init {init!r:.40}; choose one of {', '.join(INITS)}")
    places = attentions(target, targets)
    head = classifier_of(denoiser(target))
    denoiser(target).requires_grad_(False)
    if head is not None:
        head.requires_grad_(True)
    return install(target, {place: rank for place in places}, name, init=init, seed=seed)


def require_rank(rank: int) -> None:
    """Raise a ``UserError`` where ``rank`` is no number of columns."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 1024:
        raise UserError(f"rank must be a whole number from 1 to 1024; got {rank!r:.40}")


def install(target: Any, ranks: Mapping[str, int], name: str, *, init: str = "zero",
            seed: int = 0) -> list[str]:
    """Put an adapter of a rank beside each attention that ``ranks`` names; see ``add_adapters``."""
    if not name or "." in name:
        raise UserError(f"an adapter's name has letters and no dot; got {name!r:.40}")
    if any(name in one.alphas for one in processors(target).values()):
        raise UserError(f"the model has an adapter {name!r} already; unload it, or name another")
    model = denoiser(target)
    for at, (place, rank) in enumerate(ranks.items()):
        attention: Any = model.get_submodule(place)
        parts = nn.ModuleDict({
            tokens: Adapter(frozen, heads_of(attention), rank, adapts_queries(attention))
            for tokens, frozen in projections_of(attention).items()})
        if not any(p.is_meta for p in parts.parameters()):
            generator = derived_generator(seed, at)
            for adapter in parts.values():
                assert isinstance(adapter, Adapter)
                adapter.init_(init, generator)
        stack = adapt_(model, place)
        stack.adapters[name] = parts
        stack.alphas[name] = 1.0
    return list(ranks)


def set_alpha(target: Any, alpha: float | Mapping[str, float]) -> None:
    """Weigh adapters: products count α² times, and at 0 the model is what it was, bit by bit.

    Args:
        target: a model with adapters.
        alpha: one number for all adapters, or their names with a number each; others keep theirs.

    Raises:
        UserError: a number is negative or not finite, or there is no such adapter.
    """
    found = processors(target)
    known = {name for processor in found.values() for name in processor.alphas}
    wanted = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(known, alpha)
    for name, value in wanted.items():
        adapters_of(target, name)
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise UserError(f"alpha must be a number of at least 0; got {value!r:.40}")
    for processor in found.values():
        processor.alphas.update({name: float(value) for name, value in wanted.items()
                                 if name in processor.alphas})


def unload_(target: Any, name: str | None = None) -> None:
    """Take the adapter ``name`` away, or all; what is left computes what it did before.

    Raises:
        UserError: there is no such adapter.
    """
    if name is not None:
        adapters_of(target, name)
    for place, processor in processors(target).items():
        for known in list(processor.alphas) if name is None else [name]:
            if known in processor.alphas:
                del processor.adapters[known], processor.alphas[known]
        if not processor.alphas:
            restore_(denoiser(target), place)


def merge_(target: Any) -> None:
    """Write the adapters into projections whose heads are wider; no adapter is left.

    A diffusion model then runs diffusers' own code, and a ViT low-rank attentions, which
    ``optimize`` and checkpoints take. What it computes differs by rounding.

    Raises:
        UserError: there is no adapter, or an attention of diffusers normalises or rotates its
            queries.
    """
    found = processors(target)
    if not found:
        raise UserError("the model has no adapter to merge; add or load one")
    for place in found:
        if not can_merge(denoiser(target).get_submodule(place)):
            raise UserError(f"{place} normalises or rotates queries, so its heads cannot grow; "
                            "keep the adapters as they are")
    model = denoiser(target)
    for place in found:
        merge_at_(model, place)
    ranks: dict[str, Rank] = {}
    for place in found:
        ranks |= low_rank_sites(place, model.get_submodule(place))
    if ranks:  # checkpoints build the model anew by its plan
        record_(model, plan=merged(compression_of(model).ranks, RankPlan(ranks)))


@torch.no_grad()
def parameter_count(target: Any, name: str = DEFAULT) -> int:
    """The numbers of an adapter."""
    return sum(p.numel() for p in adapter_parameters(target, name))
