"""Norms and layer scales folded into the weights of fused sublayers, exactly, in float64."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.layers.attention import LowRankAttention, ValueFoldedAttention
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.plain import is_plain, is_plain_linear
from adacomcat.layers.registry import (
    Projection,
    Residual,
    attention_parts,
    attention_weights,
)
from adacomcat.layers.stock import PlainAttention


class Norm(NamedTuple):
    """A layer norm's affine part in float64, and its epsilon."""

    weight: Tensor
    bias: Tensor
    epsilon: float


class Projections(NamedTuple):
    """An attention's, in float64: wq, wk (H·rank_qk, d), wv (H·rank_vo, d), wo (out, H·rank_vo)."""

    wq: Tensor
    bq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor
    bo: Tensor


class AffineMap(NamedTuple):
    """(x v) wᵀ + bias in float64; without ``v`` x wᵀ + bias."""

    v: Tensor | None  # (in, rank)
    w: Tensor  # (out, rank) or (out, in)
    bias: Tensor  # (out,)

    @classmethod
    def of(cls, linear: nn.Module) -> "AffineMap":
        """Of a linear layer, plain or low-rank."""
        if isinstance(linear, LowRankLinear):
            factors = factors_of(linear)
            return cls(factors.v, factors.u, factors.bias)
        projection = Projection.of(cast(nn.Linear, linear))
        return cls(None, projection.weight.double(), bias_of(projection))

    def dense(self) -> "AffineMap":
        return self if self.v is None else AffineMap(None, self.w @ self.v.T, self.bias)

    def halves(self) -> "tuple[AffineMap, AffineMap]":
        """The maps to the first and to the second half of the outputs."""
        (first, second), (bias, other) = self.w.chunk(2), self.bias.chunk(2)
        return AffineMap(self.v, first, bias), AffineMap(self.v, second, other)

    def scaled(self, gamma: Tensor) -> "AffineMap":
        """The same map, its outputs multiplied by gamma (out,)."""
        return AffineMap(self.v, gamma.unsqueeze(1) * self.w, gamma * self.bias)

    def behind(self, norm: Norm) -> "AffineMap":
        """The same projection of what ``norm`` multiplies and shifts."""
        if self.v is None:
            return AffineMap(None, self.w * norm.weight, self.bias + self.w @ norm.bias)
        return AffineMap(norm.weight.unsqueeze(1) * self.v, self.w,
                          self.bias + self.w @ (norm.bias @ self.v))


def is_affine(linear: object) -> bool:
    """Whether ``AffineMap.of`` tells all that it computes."""
    return is_plain_linear(linear) or is_plain(linear, LowRankLinear)


def behind_one_factor(first: AffineMap, second: AffineMap) -> tuple[AffineMap, AffineMap]:
    """The same two maps of one x, with one ``v`` or none.

    Two factors become one beside zeros where this takes fewer products than dense maps.
    """
    if first.v is second.v:
        return first, second
    if first.v is not None and second.v is not None:
        v = torch.cat([first.v, second.v], 1)
        if v.numel() + 2 * len(first.w) * v.shape[1] < 2 * len(first.w) * len(v):
            rank = first.v.shape[1]
            return (AffineMap(v, F.pad(first.w, (0, v.shape[1] - rank)), first.bias),
                    AffineMap(v, F.pad(second.w, (rank, 0)), second.bias))
    return first.dense(), second.dense()


class RotaryProjections(NamedTuple):
    """Those of an attention whose scores do not fold, in float64."""

    q: AffineMap
    k: AffineMap
    wv: Tensor  # (H·rank_vo, d)
    wo: Tensor  # (out, H·rank_vo)
    bo: Tensor  # (out,)


Scales = dict[str, Tensor]  # weight of a quantised sublayer → (out,); empty in others


def norm_of(module: nn.Module, like: Tensor) -> Norm:
    """``like``: on the device of the projections, for a norm that has no weight."""
    norm = cast(nn.LayerNorm, module)
    width = norm.normalized_shape[0]
    weight = like.new_ones(width) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.detach()
    return Norm(weight.double(), bias.double(), norm.eps)


def projections_of(attn: nn.Module) -> tuple[Projections, int, float]:
    """The folded projections, the number of heads and the scale of the logits."""
    if isinstance(attn, LowRankAttention):
        weights = (attn.wq, attn.bq, attn.wk, attn.wv, attn.wo, attn.bo)
        return (Projections(*(w.detach().double() for w in weights)), attn.num_heads, attn.scale)
    if isinstance(attn, PlainAttention):
        q, k, v, out = _plain_projections(attn)
        bias = bias_of(out) if v.bias is None else bias_of(out) + out.weight.double() @ bias_of(v)
        return (Projections(q.weight.double(), bias_of(q), k.weight.double(), v.weight.double(),
                            out.weight.double(), bias), attn.num_heads, attn.scale)
    w = attention_weights(attn)
    wq, bq, wk, wv, bv = (t.double().flatten(0, 1) for t in (w.wq, w.bq, w.wk, w.wv, w.bv))
    wo = w.wo.double().transpose(0, 1).flatten(1)
    return Projections(wq, bq, wk, wv, wo, w.bo.double() + wo @ bv), len(w.wq), w.scale


def rotary_projections_of(attn: nn.Module) -> tuple[RotaryProjections, int, float]:
    """The projections where queries and keys do not fold, the number of heads and the scale."""
    if isinstance(attn, ValueFoldedAttention):
        values = (weight.detach().double() for weight in (attn.wv, attn.wo, attn.bo))
        return (RotaryProjections(AffineMap.of(attn.q), AffineMap.of(attn.k), *values),
                attn.num_heads, attn.scale)
    parts = attention_parts(attn)
    q, k = (AffineMap(None, part.weight.double(), bias_of(part)) for part in (parts.q, parts.k))
    wv, wo = parts.v.weight.double(), parts.out.weight.double()
    return (RotaryProjections(q, k, wv, wo, bias_of(parts.out) + wo @ bias_of(parts.v)),
            parts.num_heads, parts.scale)


def _plain_projections(attn: PlainAttention) -> list[Projection]:
    return [Projection.of(cast(nn.Linear, linear))
            for linear in (attn.q, attn.k, attn.v, attn.proj)]


def attention_scales(attn: nn.Module) -> Scales:
    if isinstance(attn, LowRankAttention):
        return {}
    if isinstance(attn, PlainAttention):
        projections = _plain_projections(attn)
    else:
        parts = attention_parts(attn)
        projections = [parts.q, parts.k, parts.v, parts.out]
    return {name: projection.scale for name, projection
            in zip(("wq", "wk", "wv", "wo"), projections, strict=True)
            if projection.scale is not None}


class Factors(NamedTuple):
    """Of one projection, in float64."""

    v: Tensor  # (in, r)
    u: Tensor  # (out, r)
    bias: Tensor  # (out,)
    scales: Scales


def factors_of(linear: nn.Module) -> Factors:
    if isinstance(linear, LowRankLinear):
        return Factors(linear.v.detach().double(), linear.u.detach().double(),
                       bias_of(Projection(linear.u, linear.bias)), {})
    first, second = (Projection.of(cast(nn.Linear, layer)) for layer in linear.children())
    scales = {name: scale for name, scale in (("v", first.scale), ("u", second.scale))
              if scale is not None}
    return Factors(first.weight.double().T, second.weight.double(), bias_of(second), scales)


def times(scale: Tensor, gamma: Tensor) -> Tensor:
    """The scales of rows that a layer scale multiplies; positive where it is zero, too."""
    scaled = scale * gamma.abs()
    return scaled.where(scaled > 0, 1)


def first_float(module: nn.Module) -> Tensor:
    """Whose device and dtype the fused weights get."""
    return next(tensor for tensor in (*module.parameters(), *module.buffers())
                if tensor.is_floating_point())


def gamma_of(part: Residual, like: Tensor) -> Tensor:
    if part.gamma is not None:
        return part.gamma.double()
    return like.new_ones(like.shape[0], dtype=torch.float64)


def bias_of(projection: Projection) -> Tensor:
    if projection.bias is None:
        return projection.weight.new_zeros(len(projection.weight), dtype=torch.float64)
    return projection.bias.detach().double()


def set_weights_(module: nn.Module, like: Tensor, **weights: Tensor | None) -> None:
    for name, weight in weights.items():
        parameter = None if weight is None else nn.Parameter(weight.to(like).contiguous(),
                                                             requires_grad=False)
        module.register_parameter(name, parameter)


def join_(*weights: nn.Parameter) -> None:
    """Store the weights in one matrix, row after row, so that one product computes them all."""
    parts = torch.cat([w.data for w in weights]).split([len(w) for w in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part
