"""Products of int8 weights and int8 activations: the formulas of the CPU kernels, in PyTorch.

A weight is W = q · s: whole numbers q from -127 to 127, and a scale s for each output channel. An
activation becomes whole numbers too, at the entrance of every product: each row x has the scale
max|x| / 127. The sums of their products are whole; scales, bias, activation and residual follow in
float. softmax(q kᵀ) v stays in float.

float32 holds the sums exactly up to 2²⁴, which 1040 inputs cannot exceed; beyond, they are rounded
as sums in float32 are. A row that holds NaN or infinity gives a row of NaN.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adacomcat.ops.reference import activate, attend, merge_heads, split_heads

LEVELS = 127  # the largest whole number; -128 is left out, so that the grid is symmetric
LEAST = 1e-35  # of a row whose scale has an inverse


class Int8Weight(NamedTuple):
    """W = q · s, (out, in)."""

    q: Tensor  # (out, in), whole numbers in any dtype
    scale: Tensor  # (out,), float32

    @classmethod
    def on_grid(cls, weight: Tensor, scale: Tensor) -> "Int8Weight":
        """The numbers behind a floating-point ``weight`` (out, in) that lies on the grid q · s.

        The weight may have been rounded to bfloat16: that moves no q by half a step.
        """
        return cls((weight.float() / scale.unsqueeze(1)).round(), scale)

    @property
    def dense(self) -> Tensor:
        """q · s in float32."""
        return self.q * self.scale.unsqueeze(1)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., in) → whole numbers q (..., in) and scales s (..., 1) with x ≈ q · s.

    s = max|x| / 127, q = x · (127 / max|x|) rounded half to even. A row below ``LEAST`` counts as
    zeros, since the inverse of its scale is no float32.
    """
    largest = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest < LEAST, 0, LEVELS / largest)
    return (x * inverse).round(), largest / LEVELS


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """(q_x qᵀ) · s_x · s + b, for x (..., in) = q_x · s_x; (..., out) in x's dtype."""
    q, scale = round_rows(x.to(torch.promote_types(x.dtype, torch.float32)))
    y = F.linear(q, weight.q.to(q.dtype)) * weight.scale * scale
    return (y if bias is None else y + bias).to(x.dtype)


def low_rank_mlp(x: Tensor, v1: Int8Weight, u1: Int8Weight, b1: Tensor | None, v2: Int8Weight,
                 u2: Int8Weight, b2: Tensor | None, activation: str | None) -> Tensor:
    """``reference.low_rank_mlp`` on int8; v1 and v2 are V1ᵀ (r1, in) and V2ᵀ (r2, hidden) here."""
    hidden = activate(linear(linear(x, v1), u1, b1), activation)
    return linear(linear(hidden, v2), u2, b2)


def dense_mlp(x: Tensor, w1: Int8Weight, b1: Tensor | None, w2: Int8Weight, b2: Tensor | None,
              activation: str | None) -> Tensor:
    """``reference.dense_mlp`` on int8."""
    return linear(activate(linear(x, w1, b1), activation), w2, b2)


def low_rank_attention(x: Tensor, wq: Int8Weight, bq: Tensor | None, wk: Int8Weight,
                       wv: Int8Weight, wo: Int8Weight, bo: Tensor | None, num_heads: int,
                       scale: float, attn_mask: Tensor | None = None) -> Tensor:
    """``reference.low_rank_attention`` on int8."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(x.dtype)
    q, k, v = (split_heads(part, num_heads)
               for part in (linear(x, wq, bq), linear(x, wk), linear(x, wv)))
    return linear(merge_heads(attend(q, k, v, scale, attn_mask)), wo, bo)


_FORMULAS = {"low_rank_mlp": low_rank_mlp, "dense_mlp": dense_mlp,
             "low_rank_attention": low_rank_attention}


def sublayer(op: str, x: Tensor, *arguments: Any, epsilon: float, residual: Tensor) -> Tensor:
    """residual + op(norm(x), arguments) on int8, between the products in float32 as in a kernel."""
    floats = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(floats), x.shape[-1:], eps=epsilon)
    return (_FORMULAS[op](normed, *arguments) + residual).to(x.dtype)
