"""Attentions of Vision Transformers with adapters: timm's, and the low-rank ones of this package.

An ``AdaptedAttention`` takes the attention's place and holds it. ``merged_attention`` makes a
low-rank attention with wider heads of both.
"""

import copy
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.customize.adapter import (
    TOKENS,
    AdapterStack,
    Projections,
    attend,
    merged_columns,
    merged_rows,
    project,
    split_heads,
    widen_keys,
    widen_queries,
    widen_values,
)
from adacomcat.errors import UserError
from adacomcat.families.timm import LowRankNormedAttention
from adacomcat.layers.attention import (
    Context,
    LowRankAttention,
    low_rank_class,
    masked_context,
)
from adacomcat.layers.registry import attention_family, attention_parts, attention_tier
from adacomcat.layers.stock import linear_of


def is_vit_attention(module: nn.Module) -> bool:
    """Whether adapters can stand beside this attention: tokens go in, tokens come out.

    Of dense ones these are attentions whose calls mean what those of timm's ``Attention`` do.
    """
    if isinstance(module, AdaptedAttention):
        return True
    if isinstance(module, LowRankAttention):
        return type(module).forward is LowRankAttention.forward
    if attention_family(module) is None or (tier := attention_tier(module)) is None:
        return False
    return low_rank_class(module, tier) in (LowRankAttention, LowRankNormedAttention)


def vit_adapts_queries(attn: nn.Module) -> bool:
    """Whether queries and keys meet as they are projected."""
    attn = _base(attn)
    if isinstance(attn, LowRankAttention):
        return attn.folds_scores
    return attention_tier(attn) == "A"


def _base(attn: nn.Module) -> nn.Module:
    return attn.base if isinstance(attn, AdaptedAttention) else attn


def vit_projections(attn: nn.Module) -> Projections:
    """The frozen projections, which share their numbers with the attention."""
    attn = _base(attn)
    if not isinstance(attn, LowRankAttention):
        parts = attention_parts(attn)
        return Projections(*(linear_of(part.weight, part.bias)
                             for part in (parts.q, parts.k, parts.v, parts.out)))
    q, k = (linear_of(attn.wq, attn.bq), linear_of(attn.wk)) if attn.folds_scores \
        else (cast(Any, attn).q, cast(Any, attn).k)
    return Projections(q, k, linear_of(attn.wv), linear_of(attn.wo, attn.bo))


class _Call(NamedTuple):
    """One call of an attention up to the softmax, and what stands behind its output projection."""

    q: Tensor  # (B, H, N, width)
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    attn_drop: float
    out: tuple[Tensor, Tensor | None]
    proj_drop: float


def _dense_call(attn: nn.Module, x: Tensor, context: Context) -> _Call:
    parts = attention_parts(attn)
    q, k, v = (split_heads(F.linear(x, part.weight, part.bias), parts.num_heads)
               for part in (parts.q, parts.k, parts.v))
    if attention_tier(attn) == "B":
        normed: Any = attn
        q, k = normed.q_norm(q), normed.k_norm(k)
    return _Call(q, k, v, context[0], parts.scale, parts.attn_drop,
                 (parts.out.weight, parts.out.bias), parts.proj_drop)


def _low_rank_call(attn: LowRankAttention, x: Tensor, context: Context) -> _Call:
    mask, rope = context
    values = split_heads(F.linear(x, attn.wv), attn.num_heads)
    return _Call(*attn.queries_and_keys(x, rope), values, mask, attn.scale, attn.attn_drop.p,
                 (attn.wo, attn.bo), attn.proj_drop.p)


class AdaptedAttention(AdapterStack):
    """A ViT's attention with adapters beside it.

    ``base`` runs where all have α = 0, and without gradients where their factors are zero.

    Args:
        base: an attention that ``is_vit_attention``.
    """

    apart_from_checkpoints = True  # their folders hold it merged

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.train(base.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens (B, N, d) → (B, N, out), with the arguments of ``base``."""
        active = self.active(TOKENS)
        if not active:
            return self.base(x, *args, **kwargs)
        base = self.base
        if isinstance(base, LowRankAttention):
            call = _low_rank_call(base, x, base.score_context(x, *args, **kwargs))
        else:
            call = _dense_call(base, x, masked_context(x, *args, **kwargs))
        mask = call.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(call.q.dtype)
        attended = attend(widen_queries(call.q, x, active), widen_keys(call.k, x, active),
                          widen_values(call.v, x, active), call.scale, mask,
                          call.attn_drop if self.training else 0.0)
        found = project(attended, lambda heads: F.linear(heads, *call.out), active)
        return F.dropout(found, call.proj_drop, self.training)


@torch.no_grad()
def merged_attention(adapted: AdaptedAttention) -> LowRankAttention:
    """A low-rank attention whose heads are Σr wider, and which computes the same.

    Of norms or rotations behind queries and keys, the value path alone is wider.
    """
    base, active = adapted.base, adapted.active(TOKENS)
    frozen, more = vit_projections(adapted), sum(adapter.rank for adapter, _ in active)
    assert frozen.out is not None
    made = _wider(base, frozen, more)
    heads = made.num_heads

    def rows(name: str, power: int) -> nn.Linear:
        added = [alpha**power * getattr(adapter, name) for adapter, alpha in active]
        return merged_rows(getattr(frozen, name), heads, 1.0, added)

    def fixed(numbers: Tensor) -> nn.Parameter:
        return nn.Parameter(numbers.detach(), requires_grad=False)

    if made.folds_scores:
        q, k = rows("q", 1), rows("k", 1)
        made.wq, made.wk = fixed(q.weight), fixed(k.weight)
        made.bq = fixed(q.weight.new_zeros(len(q.weight)) if q.bias is None else q.bias)
    out = merged_columns(frozen.out, heads, [adapter.o for adapter, _ in active
                                             if adapter.o is not None])
    made.wv, made.wo = fixed(rows("v", 2).weight), fixed(out.weight)
    made.bo = fixed(_output_bias(frozen))
    return made.train(adapted.training)


def _wider(base: nn.Module, frozen: Projections, more: int) -> LowRankAttention:
    """Of the shape that the merged attention has; its factors are still to be filled."""
    if isinstance(base, LowRankAttention):
        made = copy.deepcopy(base)
        made.rank_qk += more if made.folds_scores else 0
        made.rank_vo += more
        return made
    tier, heads = attention_tier(base), attention_parts(base).num_heads
    rank_qk = frozen.q.out_features // heads + (more if tier == "A" else 0)
    made = low_rank_class(base, tier).like(base, rank_qk, frozen.v.out_features // heads + more)
    return cast(LowRankAttention, made.requires_grad_(False))


def _output_bias(frozen: Projections) -> Tensor:
    """bo + Wo bv: weights of a softmax add up to 1, so the values' bias passes through."""
    out, values = cast(nn.Linear, frozen.out), frozen.v.bias
    bias = out.weight.new_zeros(out.out_features) if out.bias is None else out.bias.clone()
    return bias if values is None else bias + out.weight @ values


def classifier_of(model: nn.Module) -> nn.Module | None:
    """The classifier of a timm model; None where it has no weights.

    Raises:
        UserError: there are several.
    """
    found = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore
    if isinstance(found, tuple | list):
        raise UserError(f"{type(model).__name__} has several classifiers, and adapters train "
                        "beside one; take a model with one")
    has_weights = isinstance(found, nn.Module) and any(True for _ in found.parameters())
    return found if has_weights else None
