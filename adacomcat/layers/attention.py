"""Low-rank multi-head attention: the drop-in of each tier, whatever library the dense one is of.

Drop-ins with a library's own signature derive from these two, in ``adacomcat/families``.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
from adacomcat.layers.inherit import inherit_
from adacomcat.layers.linear import plain_linear, require_rank, unplain_linear
from adacomcat.layers.registry import (
    AttentionParts,
    Projection,
    attention_family,
    attention_parts,
    attention_tier,
    attention_weights,
)
from adacomcat.layers.stock import (
    FACTORS,
    PlainAttention,
    carry_over_,
    causal_mask,
    linear_of,
    refuse_scripting,
    softmax_weights,
    weights_are_read,
    weights_of,
)

# (mask, rotary embedding): a boolean mask, or one that is added to the logits; None where absent.
Context = tuple[Tensor | None, Tensor | None]


def factorize_attention(attn: nn.Module, statistics: AttentionStatistics | None = None, *,
                        shrinkage: float = 0.0) -> tuple[ScoreFactors, ValueFactors]:
    """Full-rank factors of a tier-A attention, scores and values."""
    w = attention_weights(attn)
    scores = factorize_scores(w.wq, w.bq, w.wk, w.scale, statistics, shrinkage=shrinkage)
    values = factorize_values(w.wv, w.bv, w.wo, w.bo, statistics, shrinkage=shrinkage)
    return scores, values


def _origins(attn: nn.Module, parts: AttentionParts) -> dict[str, Tensor]:
    """Name of a drop-in's parameter → the parameter of ``attn`` that it comes from."""
    found: dict[str, Tensor] = dict(attn.named_parameters())
    named = {"q": parts.q, "k": parts.k, "v": parts.v, "o": parts.out}
    for letter, projection in named.items():
        if isinstance(linear := projection.origin, nn.Linear):
            bias = linear.weight if linear.bias is None else linear.bias
            found |= {f"w{letter}": linear.weight, f"{letter}.weight": linear.weight,
                      f"b{letter}": bias, f"{letter}.bias": bias}
    return found


def masked_context(x: Tensor, attn_mask: Tensor | None = None,
                   is_causal: bool = False) -> Context:
    """The arguments of timm's ``Attention``: a mask, or each token sees those before it only."""
    return causal_mask(attn_mask, x, is_causal), None


class LowRankAttention(nn.Module):
    """y = Σ_h softmax(s (x wq_hᵀ + bq_h)(x wk_hᵀ)ᵀ + mask) (x wv_hᵀ) wo_hᵀ + bo.

    wq, wk: (H·rank_qk, d), wv: (H·rank_vo, d), wo: (out, H·rank_vo). Equal to the dense attention
    where wq_hᵀ wk_h is its W_qᵀ W_k, and wo_h wv_h its W_o W_v. A key bias cancels in the softmax;
    a value bias passes through it unchanged, into bo.

    Subclasses give ``forward`` another signature by overriding ``score_context``.

    Args:
        dim: Width d of the tokens.
        num_heads: H.
        rank_qk: Rank per head of the logits' matrix.
        rank_vo: Rank per head of the product of value and output projection.
        scale: s, that of the dense attention, whatever the ranks.
        dim_out: Width of the result; ``dim`` where not given.
        attn_drop: Dropout probability of the attention weights, in training.
        proj_drop: Dropout probability of the result, in training.
        device: Where the parameters lie.
        dtype: Type of the parameters.
    """

    folds_scores: ClassVar[bool] = True  # whether wq, bq and wk exist: tier A
    # Whether a mask is all that this very class adds to its logits, so that ``optimize`` fuses it.
    only_masks: ClassVar[bool] = True
    # What ``to_plain`` makes. A subclass with another forward names its own, or has none.
    plain: ClassVar[type[PlainAttention]] = PlainAttention
    attn_drop: nn.Dropout
    proj_drop: nn.Dropout

    def __init__(self, dim: int, num_heads: int, rank_qk: int, rank_vo: int, *,
                 scale: float, dim_out: int | None = None, attn_drop: float = 0.0,
                 proj_drop: float = 0.0, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)  # a drop-in may derive from the dense class, too
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
        """Uninitialised, of ``attn``'s shape, with what ``attn`` needs beside its projections.

        Its parameters train where those of ``attn`` do that they come from.
        """
        parts = attention_parts(attn)
        weight = parts.out.weight
        module = cls(parts.dim, parts.num_heads, rank_qk, rank_vo, scale=parts.scale,
                     dim_out=parts.dim_out, attn_drop=parts.attn_drop, proj_drop=parts.proj_drop,
                     device=weight.device, dtype=weight.dtype)
        module.adopt(attn)
        inherit_(module, attn, _origins(attn, parts))
        return module.train(attn.training)

    @staticmethod
    def from_timm(attn: nn.Module, rank_qk: int | None = None, rank_vo: int | None = None,
                  statistics: AttentionStatistics | None = None) -> "LowRankAttention":
        """Fold an attention of tier A. ``compress`` serves the other tiers.

        Args:
            attn: An attention of timm, or of a class that ``register_attention`` made known.
            rank_qk: Rank per head of the logits' matrix; full where not given.
            rank_vo: Rank per head of values and outputs; full where not given.
            statistics: Moments of the tokens; with them the truncation is activation-aware.

        Raises:
            UserError: ``attn`` is not of tier A, or a rank exceeds the head dimension.
        """
        if attention_tier(attn) != "A":
            raise UserError(f"{type(attn).__name__} does not fold whole; use adacomcat.compress")
        scores, values = factorize_attention(attn, statistics)
        full_qk, full_vo = scores.wk.shape[1], values.wv.shape[1]
        rank_qk = full_qk if rank_qk is None else rank_qk
        rank_vo = full_vo if rank_vo is None else rank_vo
        require_rank("rank_qk", rank_qk, full_qk)
        require_rank("rank_vo", rank_vo, full_vo)
        module = low_rank_class(attn, "A").like(attn, rank_qk, rank_vo)
        module.set_scores_(scores)
        module.set_values_(values)
        return module

    @torch.no_grad()
    def set_scores_(self, factors: ScoreFactors) -> None:
        """Take the first ``rank_qk`` rows of each head."""
        rank = self.rank_qk
        self.wq.copy_(factors.wq[:, :rank].flatten(0, 1))
        self.bq.copy_(factors.bq[:, :rank].flatten())
        self.wk.copy_(factors.wk[:, :rank].flatten(0, 1))

    @torch.no_grad()
    def set_values_(self, factors: ValueFactors) -> None:
        """Take the first ``rank_vo`` rows of each head; bo absorbs the mean of the others."""
        rank = self.rank_vo
        self.wv.copy_(factors.wv[:, :rank].flatten(0, 1))
        self.wo.copy_(factors.wo[..., :rank].transpose(0, 1).flatten(1))
        self.bo.copy_(factors.truncated_bias(rank))

    def adopt(self, attn: nn.Module) -> None:
        """Take over what subclasses need of the dense module beside its projections."""

    def to_plain(self) -> PlainAttention:
        """The same factors in linear layers of PyTorch's own.

        Raises:
            UserError: A class of your own names no class for it.
        """
        own = vars(type(self))
        if "plain" not in own and ("score_context" in own or "queries_and_keys" in own):
            raise UserError(f"{type(self).__name__} has no plain form; name one as its attribute "
                            "`plain`, a subclass of adacomcat.layers.stock.PlainAttention")
        return self.plain(self, *self._plain_queries_and_keys())

    __prepare_scriptable__ = refuse_scripting

    def _plain_queries_and_keys(self) -> tuple[nn.Module, nn.Module]:
        return linear_of(self.wq, self.bq), linear_of(self.wk)

    @classmethod
    def from_plain(cls, plain: PlainAttention) -> "LowRankAttention":
        """The drop-in whose ``to_plain`` made ``plain``.

        Raises:
            UserError: One of its projections is no plain linear layer any more.
        """
        (wv, _), (wo, bo) = weights_of(plain.v), weights_of(plain.proj)
        made = cls(wv.shape[1], plain.num_heads, plain.rank_qk, plain.rank_vo, scale=plain.scale,
                   dim_out=len(wo), device=wv.device, dtype=wv.dtype)
        carry_over_(plain, made, FACTORS)
        made.wv, made.wo = wv, wo
        made.bo = made.bo if bo is None else bo
        made._take_queries_and_keys(plain)
        return made.train(plain.training)

    def _take_queries_and_keys(self, plain: PlainAttention) -> None:
        (wq, bq), (wk, _) = weights_of(plain.q), weights_of(plain.k)
        self.wq, self.wk = wq, wk
        self.bq = self.bq if bq is None else bq

    def queries_and_keys(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, H, N, r) each."""
        return (self._heads(F.linear(x, self.wq, self.bq)), self._heads(F.linear(x, self.wk)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, x: Tensor, mask: Tensor | None, rope: Tensor | None = None) -> Tensor:
        """The result for tokens x (B, N, d); mask: boolean, or added to the logits."""
        dropping = self.training and self.attn_drop.p
        if self.folds_scores and not dropping and not weights_are_read(self.attn_drop, x):
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
        if weights_are_read(self.attn_drop, x):
            return self.attn_drop(softmax_weights(q, k, self.scale, mask)) @ values
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        values = values.expand(-1, self.num_heads, -1, -1)
        return F.scaled_dot_product_attention(
            q, k, values, attn_mask=mask, scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens (B, N, d) → (B, N, out). The other arguments are those of ``score_context``."""
        return self.attend(x, *self.score_context(x, *args, **kwargs))

    def attended(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Context] | None:
        """The tokens (B, N, d) of a call of ``forward``, and what they attend under.

        None where queries and keys come from different tokens.
        """
        return x, self.score_context(x, *args, **kwargs)

    def score_context(self, x: Tensor, *args: Any, **kwargs: Any) -> Context:
        """What a call of ``forward`` with these arguments attends under.

        Here the arguments are those of ``masked_context``. A subclass overrides this with those of
        the dense attention's forward.
        """
        return masked_context(x, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, rank_qk={self.rank_qk}, rank_vo={self.rank_vo}"


class ValueFoldedAttention(LowRankAttention):
    """Tier B: ``q`` and ``k`` are linear layers of their own, dense or low-rank, and only the value
    path is folded. ``rank_qk`` is then the head dimension.

    Subclasses override ``queries_and_keys`` with what stands behind the two projections.
    """

    folds_scores = False
    q: nn.Module
    k: nn.Module

    def _make_scores(self, dim: int, empty: Callable[..., nn.Parameter]) -> None:
        self.q, self.k = nn.Identity(), nn.Identity()

    def adopt(self, attn: nn.Module) -> None:
        parts = attention_parts(attn)
        self.q, self.k = _dense_linear(parts.q), _dense_linear(parts.k)

    def _plain_queries_and_keys(self) -> tuple[nn.Module, nn.Module]:
        return plain_linear(self.q), plain_linear(self.k)

    def _take_queries_and_keys(self, plain: PlainAttention) -> None:
        self.q, self.k = unplain_linear(plain.q), unplain_linear(plain.k)

    def queries_and_keys(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._heads(self.q(x)), self._heads(self.k(x))


def _dense_linear(projection: Projection) -> nn.Linear:
    weight, bias = projection.weight, projection.bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None,
                       device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def low_rank_class(attn: nn.Module, tier: str | None) -> type[LowRankAttention]:
    """The drop-in for this exact type.

    Raises:
        UserError: The class is unknown, or does not fold at this tier. Folding the scores of a
            tier-B attention would be silently wrong.
    """
    family = attention_family(attn)
    if family is None or tier is None or tier not in family.low_rank:
        raise UserError(f"{type(attn).__name__} does not fold; its linears can still be made "
                        "low-rank")
    return family.low_rank[tier]
