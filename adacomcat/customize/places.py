"""Where adapters stand: attentions of diffusers and of Vision Transformers, asked the same way."""

from typing import Any

from torch import nn

from adacomcat.customize import attention as diffusion
from adacomcat.customize.adapter import TOKENS, AdapterStack, Projections
from adacomcat.customize.vit import (
    AdaptedAttention,
    is_vit_attention,
    merged_attention,
    vit_adapts_queries,
    vit_projections,
)
from adacomcat.layers.attention import LowRankAttention
from adacomcat.sites import Rank
from adacomcat.utils.model import replace_


def places_in(model: nn.Module) -> dict[str, Any]:
    """Name → attention, of all that adapters can stand beside."""
    found: dict[str, Any] = {}
    inside: tuple[str, ...] = ()  # what an adapted attention holds is no place of its own
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, AdaptedAttention):
            inside = (*inside, f"{name}." if name else "")
        if diffusion.attention_kind(module) is not None or is_vit_attention(module):
            found[name] = module
    return found


def is_diffusion(attention: nn.Module) -> bool:
    """Whether a place is an attention of diffusers, whose processor runs it."""
    return diffusion.attention_kind(attention) is not None


def projections_of(attention: Any) -> dict[str, Projections]:
    """Kind of tokens → the frozen projections of an attention."""
    if is_diffusion(attention):
        return diffusion.projections_of(attention)
    return {TOKENS: vit_projections(attention)}


def adapts_queries(attention: Any) -> bool:
    """Whether queries and keys meet without a norm or a rotation between."""
    if is_diffusion(attention):
        return diffusion.adapts_queries(attention)
    return vit_adapts_queries(attention)


def heads_of(attention: Any) -> int:
    if is_diffusion(attention):
        return attention.heads
    found: Any = attention.base if isinstance(attention, AdaptedAttention) else attention
    return found.num_heads


def stack_of(attention: Any) -> AdapterStack | None:
    """The adapters beside an attention, where it has any."""
    found = attention if isinstance(attention, AdaptedAttention) \
        else getattr(attention, "processor", None)
    return found if isinstance(found, AdapterStack) else None


def adapt_(model: nn.Module, place: str) -> AdapterStack:
    """The stack of a place, which is put there where none is."""
    attention: Any = model.get_submodule(place)
    if (found := stack_of(attention)) is not None:
        return found
    if is_diffusion(attention):
        attention.set_processor(diffusion.adapted_processor(attention))
        return attention.processor
    adapted = AdaptedAttention(attention)
    replace_(model, place, adapted)
    return adapted


def restore_(model: nn.Module, place: str) -> None:
    """Take the stack of a place away."""
    attention: Any = model.get_submodule(place)
    if isinstance(attention, AdaptedAttention):
        replace_(model, place, attention.base)
    else:
        attention.set_processor(attention.processor.original)


def merge_at_(model: nn.Module, place: str) -> None:
    """Write the adapters of a place into wider projections."""
    attention: Any = model.get_submodule(place)
    stack = stack_of(attention)
    if stack is None or not stack.active(TOKENS):
        restore_(model, place)
    elif isinstance(attention, AdaptedAttention):
        replace_(model, place, merged_attention(attention))
    else:
        diffusion.merge_attention_(attention)


def low_rank_sites(place: str, attention: nn.Module) -> dict[str, Rank]:
    """Site → rank of a low-rank attention; of another one nothing."""
    if not isinstance(attention, LowRankAttention):
        return {}
    scores: dict[str, Rank] = {f"{place}.qk": attention.rank_qk} if attention.folds_scores else {}
    return scores | {f"{place}.vo": attention.rank_vo}


def can_merge(attention: Any) -> bool:
    """Whether the heads can grow: in diffusers' attentions queries and values have one width."""
    return not is_diffusion(attention) or adapts_queries(attention)
