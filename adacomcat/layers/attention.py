"""Low-rank multi-head attention, a drop-in for timm's attention modules."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as CosineAttention
from torch import Tensor, nn

from adacomcat import ops
from adacomcat.errors import UserError
from adacomcat.factorize.factors import (
    AttentionStatistics,
    ScoreFactors,
    ValueFactors,
    factorize_scores,
    factorize_values,
)
from adacomcat.sites import attention_tier, has_bias


class AttentionWeights(NamedTuple):
    """The projections of a dense attention, head by head; absent biases are zeros."""

    wq: Tensor  # (H, head_dim, d)
    wk: Tensor
    wv: Tensor
    bq: Tensor  # (H, head_dim)
    bk: Tensor
    bv: Tensor
    wo: Tensor  # (H, out, head_dim)
    bo: Tensor  # (out,)


def attention_weights(attn: nn.Module) -> AttentionWeights:
    """Read the weights of any attention that folds, whichever way timm stores its biases."""
    heads = attn.num_heads
    if getattr(attn, "qkv", None) is not None:
        weights = attn.qkv.weight.detach().chunk(3)
        biases = [None] * 3 if attn.qkv.bias is None else list(attn.qkv.bias.detach().chunk(3))
        if getattr(attn, "q_bias", None) is not None:
            biases = [attn.q_bias.detach(), None, attn.v_bias.detach()]
    else:
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        weights = [projection.weight.detach() for projection in projections]
        biases = [None if p.bias is None else p.bias.detach() for p in projections]
    per_head = [weight.reshape(heads, -1, weight.shape[1]) for weight in weights]
    per_head_bias = [per_head[0].new_zeros(per_head[0].shape[:2]) if bias is None
                     else bias.reshape(heads, -1) for bias in biases]
    wo = attn.proj.weight.detach()
    bo = wo.new_zeros(wo.shape[0]) if attn.proj.bias is None else attn.proj.bias.detach()
    wo = wo.reshape(wo.shape[0], heads, -1).transpose(0, 1)
    return AttentionWeights(*per_head, *per_head_bias, wo, bo)


def factorize_attention(attn: nn.Module, statistics: AttentionStatistics | None = None, *,
                        shrinkage: float = 0.0) -> tuple[ScoreFactors, ValueFactors]:
    """Full-rank factors of a tier-A attention, scores and values."""
    w = attention_weights(attn)
    scores = factorize_scores(w.wq, w.bq, w.wk, attn.scale, statistics, shrinkage=shrinkage)
    values = factorize_values(w.wv, w.bv, w.wo, w.bo, statistics, shrinkage=shrinkage)
    return scores, values


def causal_mask(mask: Tensor | None, x: Tensor, is_causal: bool) -> Tensor | None:
    if not is_causal:
        return mask
    tokens = x.shape[1]
    return torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()


class LowRankAttention(nn.Module):
    """y = Σ_h softmax(s (x wq_hᵀ + bq_h)(x wk_hᵀ)ᵀ + mask) (x wv_hᵀ) wo_hᵀ + bo.

    wq, wk: (H·rank_qk, d), wv: (H·rank_vo, d), wo: (out, H·rank_vo). Equal to timm's ``Attention``
    where wq_hᵀ wk_h is its W_qᵀ W_k, and wo_h wv_h its W_o W_v. A key bias cancels in the softmax;
    a value bias passes through it unchanged, into bo. ``scale`` stays that of the dense model.
    """

    def __init__(self, dim: int, num_heads: int, rank_qk: int, rank_vo: int, *,
                 scale: float, dim_out: int | None = None, attn_drop: float = 0.0,
                 proj_drop: float = 0.0, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_heads, self.rank_qk, self.rank_vo = num_heads, rank_qk, rank_vo
        self.scale = scale
        dim_out = dim_out or dim

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self._make_scores(dim, empty)
        self.wv = empty(num_heads * rank_vo, dim)
        self.wo = empty(dim_out, num_heads * rank_vo)
        self.bo = empty(dim_out)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        for parameter in self.parameters():
            nn.init.zeros_(parameter) if parameter.ndim == 1 else nn.init.xavier_uniform_(parameter)

    def _make_scores(self, dim: int, empty: Callable[..., nn.Parameter]) -> None:
        rows = self.num_heads * self.rank_qk
        self.wq, self.bq, self.wk = empty(rows, dim), empty(rows), empty(rows, dim)

    @classmethod
    def like(cls, attn: nn.Module, rank_qk: int, rank_vo: int) -> "LowRankAttention":
        """Uninitialised, of ``attn``'s shape, with what ``attn`` needs beside its projections."""
        projection = attn.qkv if attn.qkv is not None else attn.q_proj
        weight = attn.proj.weight
        module = cls(projection.in_features, attn.num_heads, rank_qk, rank_vo,
                     scale=getattr(attn, "scale", 1.0), dim_out=attn.proj.out_features,
                     attn_drop=attn.attn_drop.p, proj_drop=attn.proj_drop.p,
                     device=weight.device, dtype=weight.dtype)
        module._adopt(attn)
        return module.train(attn.training)

    @staticmethod
    def from_timm(attn: nn.Module, rank_qk: int | None = None, rank_vo: int | None = None,
                  statistics: AttentionStatistics | None = None) -> "LowRankAttention":
        """Fold a tier-A ``attn`` to these ranks per head (None: full); statistics make it
        activation-aware. ``compress`` serves the other tiers."""
        if attention_tier(attn) != "A":
            raise UserError(f"{type(attn).__name__} does not fold whole; use adacomcat.compress")
        scores, values = factorize_attention(attn, statistics)
        rank_qk, rank_vo = rank_qk or scores.wk.shape[1], rank_vo or values.wv.shape[1]
        module = low_rank_class(attn, "A").like(attn, rank_qk, rank_vo)
        module.set_scores_(scores)
        module.set_values_(values)
        return module

    @torch.no_grad()
    def set_scores_(self, factors: ScoreFactors) -> None:
        rank = self.rank_qk
        self.wq.copy_(factors.wq[:, :rank].flatten(0, 1))
        self.bq.copy_(factors.bq[:, :rank].flatten())
        self.wk.copy_(factors.wk[:, :rank].flatten(0, 1))

    @torch.no_grad()
    def set_values_(self, factors: ValueFactors) -> None:
        rank = self.rank_vo
        self.wv.copy_(factors.wv[:, :rank].flatten(0, 1))
        self.wo.copy_(factors.wo[..., :rank].transpose(0, 1).flatten(1))
        self.bo.copy_(factors.truncated_bias(rank))

    def _adopt(self, attn: nn.Module) -> None:
        """Take over what subclasses need of the dense module."""

    @property
    def _folded(self) -> bool:
        return True

    def queries_and_keys(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, H, N, r) each."""
        return (self._heads(F.linear(x, self.wq, self.bq)), self._heads(F.linear(x, self.wk)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, x: Tensor, mask: Tensor | None, rope: Tensor | None = None) -> Tensor:
        if self._folded and not (self.training and self.attn_drop.p):
            y = ops.low_rank_attention(x, self.wq, self.bq, self.wk, self.wv, self.wo, self.bo,
                                       self.num_heads, self.scale, mask)
        else:
            values = self._heads(F.linear(x, self.wv))
            averaged = self.average(x, values, mask, rope)
            y = F.linear(averaged.transpose(1, 2).flatten(2), self.wo, self.bo)
        return self.proj_drop(y)

    def average(self, x: Tensor, values: Tensor, mask: Tensor | None,
                rope: Tensor | None = None) -> Tensor:
        """softmax(…) values, for values (B, H or 1, N, ·)."""
        q, k = self.queries_and_keys(x, rope)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        values = values.expand(-1, self.num_heads, -1, -1)
        return F.scaled_dot_product_attention(
            q, k, values, attn_mask=mask, scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        return self.attend(x, causal_mask(attn_mask, x, is_causal))

    def score_context(self, x: Tensor, attn_mask: Tensor | None = None,
                      is_causal: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """(mask, rope) that a call with these arguments attends under."""
        return causal_mask(attn_mask, x, is_causal), None

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, rank_qk={self.rank_qk}, rank_vo={self.rank_vo}"


class LowRankWindowAttention(LowRankAttention):
    """Swin's windows: the relative position bias stays, added to the low-rank logits."""

    def _adopt(self, attn: nn.Module) -> None:
        self.relative_position_bias_table = nn.Parameter(
            attn.relative_position_bias_table.detach().clone())
        self.register_buffer("relative_position_index", attn.relative_position_index.clone(),
                             persistent=False)

    def _bias(self) -> Tensor:
        return _gathered(self.relative_position_bias_table, self.relative_position_index)

    def score_context(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return _window_mask(x, self._bias(), mask), None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attend(x, *self.score_context(x, mask))


class LowRankBeitAttention(LowRankWindowAttention):
    """BEiT: an optional relative position bias, per layer or shared."""

    def _adopt(self, attn: nn.Module) -> None:
        self.relative_position_bias_table = None
        if attn.relative_position_bias_table is not None:
            super()._adopt(attn)

    def score_context(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None
                      ) -> tuple[Tensor | None, None]:
        bias = None if self.relative_position_bias_table is None else self._bias()
        if shared_rel_pos_bias is not None:
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        return bias, None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self.attend(x, *self.score_context(x, shared_rel_pos_bias))


class LowRankEvaAttention(LowRankAttention):
    """EVA without rotary embedding: tier A behind EVA's signature."""

    def score_context(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                      is_causal: bool = False) -> tuple[Tensor | None, None]:
        if rope is not None:
            raise UserError("this attention was folded for a model without rotary embedding")
        return causal_mask(attn_mask, x, is_causal), None

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        return self.attend(x, *self.score_context(x, rope, attn_mask, is_causal))


class LowRankRotaryAttention(LowRankAttention):
    """Tier B: q and k are low-rank linears with what stands behind them (norms, rotary embedding);
    only the value path is folded. ``rank_qk`` is then the head dimension."""

    def _make_scores(self, dim: int, empty: Callable[..., nn.Parameter]) -> None:
        self.q: nn.Module = nn.Identity()
        self.k: nn.Module = nn.Identity()

    def _adopt(self, attn: nn.Module) -> None:
        weights = attention_weights(attn)
        self.q = _dense_projection(weights.wq, weights.bq if has_bias(attn, "q") else None)
        self.k = _dense_projection(weights.wk, weights.bk if has_bias(attn, "k") else None)
        self._adopt_scores(attn)

    def _adopt_scores(self, attn: nn.Module) -> None:
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.num_prefix_tokens = getattr(attn, "num_prefix_tokens", 0)
        self.rotate_half = getattr(attn, "rotate_half", False)

    @property
    def _folded(self) -> bool:
        return False

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix, patches = x.split([self.num_prefix_tokens, x.shape[2] - self.num_prefix_tokens], 2)
        rotated = apply_rot_embed_cat(patches, rope, half=self.rotate_half)
        return torch.cat([prefix, rotated], dim=2).type_as(x)

    def queries_and_keys(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k = self.q_norm(self._heads(self.q(x))), self.k_norm(self._heads(self.k(x)))
        if rope is None:
            return q, k
        return self._rotate(q, rope), self._rotate(k, rope)

    def score_context(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                      is_causal: bool = False) -> tuple[Tensor | None, Tensor | None]:
        return causal_mask(attn_mask, x, is_causal), rope

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        return self.attend(x, *self.score_context(x, rope, attn_mask, is_causal))


class LowRankNormedAttention(LowRankRotaryAttention):
    """Tier B with timm's ``Attention`` signature: normalised queries and keys, no rotation."""

    def score_context(self, x: Tensor, attn_mask: Tensor | None = None,
                      is_causal: bool = False) -> tuple[Tensor | None, None]:
        return causal_mask(attn_mask, x, is_causal), None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        return self.attend(x, *self.score_context(x, attn_mask, is_causal))


class LowRankCosineAttention(LowRankRotaryAttention):
    """Tier B, swin v2: cosine similarity times a learned scale, plus a learned position bias."""

    def _adopt_scores(self, attn: nn.Module) -> None:
        self.scale = 1.0
        self.logit_scale = nn.Parameter(attn.logit_scale.detach().clone())
        self.cpb_mlp = attn.cpb_mlp
        for name in ("relative_coords_table", "relative_position_index"):
            self.register_buffer(name, getattr(attn, name).clone(), persistent=False)

    def queries_and_keys(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q = F.normalize(self._heads(self.q(x)), dim=-1)
        k = F.normalize(self._heads(self.k(x)), dim=-1)
        return q * self.logit_scale.clamp(max=math.log(100.0)).exp(), k

    def _bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * torch.sigmoid(_gathered(table, self.relative_position_index))

    def score_context(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return _window_mask(x, self._bias(), mask), None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attend(x, *self.score_context(x, mask))


def _gathered(table: Tensor, index: Tensor) -> Tensor:
    """(positions, H) by (area, area) → (1, H, area, area)."""
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).unsqueeze(0)


def _window_mask(x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """The bias of every window, plus the shift's mask (windows, area, area)."""
    if mask is None:
        return bias
    return (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)


def _dense_projection(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    heads, head_dim, dim = weight.shape
    linear = nn.Linear(dim, heads * head_dim, bias=bias is not None,
                       device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight.flatten(0, 1))
    if bias is not None:
        linear.bias.data.copy_(bias.flatten())
    return linear


_FOLDED = {Attention: LowRankAttention, EvaAttention: LowRankEvaAttention,
           WindowAttention: LowRankWindowAttention, BeitAttention: LowRankBeitAttention}


def low_rank_class(attn: nn.Module, tier: str | None) -> type[LowRankAttention]:
    """The drop-in for this exact type; folding QK of a tier-B module would be silently wrong."""
    kind = type(attn)
    if tier == "B":
        return {Attention: LowRankNormedAttention,
                CosineAttention: LowRankCosineAttention}.get(kind, LowRankRotaryAttention)
    if tier is None or kind not in _FOLDED:
        raise UserError(f"{kind.__name__} does not fold; its linears can still be made low-rank")
    return _FOLDED[kind]
