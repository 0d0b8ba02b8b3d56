"""The ops: public functions, schemas, shapes, gradients and flop formulas.

Each op also returns the intermediates that its backward pass reuses, if there are any; they are
empty unless `keep`.
The implementation is chosen in `backends.pick`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adacomcat.errors import UserError
from adacomcat.ops import backends
from adacomcat.ops.reference import ACTIVATIONS
from adacomcat.ops.registry import _OPS

__all__ = ["dense_mlp", "gated_low_rank_linear", "low_rank_attention", "low_rank_linear",
           "low_rank_mlp"]


def low_rank_linear(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act((x V) Uᵀ + b) + residual.

    x (..., in), V (in, r), U (out, r), b (out,), residual (..., out); activation one of gelu,
    gelu_tanh, silu, relu or None.
    """
    _check_activation(activation)
    x, v, u, bias, residual = _autocast(x, v, u, bias, residual)
    keep = _needs_grad(x, v, u, bias, residual)
    if not keep and (kernel := backends.direct_kernel("low_rank_linear", x)):
        return kernel(x, v, u, bias, activation, residual)[0]
    return _OPS.low_rank_linear(x, v, u, bias, activation, residual, keep)[0]


def gated_low_rank_linear(
    x: Tensor, v: Tensor, gate: Tensor, u: Tensor, bias: Tensor | None = None
) -> Tensor:
    """((x V) * gate) Uᵀ + b.  x (..., in), V (in, r), gate (r,), U (out, r), b (out,)."""
    x, v, gate, u, bias = _autocast(x, v, gate, u, bias)
    keep = _needs_grad(x, v, gate, u, bias)
    return _OPS.gated_low_rank_linear(x, v, gate, u, bias, keep)[0]


def low_rank_mlp(
    x: Tensor,
    v1: Tensor,
    u1: Tensor,
    b1: Tensor | None,
    v2: Tensor,
    u2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    *,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """(h V2) U2ᵀ + b2 (+ residual) with h = act((x̂ V1) U1ᵀ + b1).

    x (..., in), V1 (in, r1), U1 (hidden, r1), V2 (hidden, r2), U2 (out, r2). x̂ is x, or with an
    ``epsilon`` its layer norm without weight and bias.
    """
    _check_activation(activation)
    x, v1, u1, b1, v2, u2, b2, residual = _autocast(x, v1, u1, b1, v2, u2, b2, residual)
    keep = _needs_grad(x, v1, u1, b1, v2, u2, b2, residual)
    if not keep and (kernel := backends.direct_kernel("low_rank_mlp", x)):
        return kernel(x, v1, u1, b1, v2, u2, b2, activation, epsilon=epsilon,
                      residual=residual)[0]
    x = _normalized(x, epsilon)
    y = _OPS.low_rank_mlp(x, v1, u1, b1, v2, u2, b2, activation, keep)[0]
    return y if residual is None else y + residual


def dense_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    *,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(x̂ W1ᵀ + b1) W2ᵀ + b2 (+ residual), the hidden layer computed anew for gradients.

    x (..., in), W1 (hidden, in), W2 (out, hidden). x̂ is x, or with an ``epsilon`` its layer norm
    without weight and bias.
    """
    _check_activation(activation)
    x, w1, b1, w2, b2, residual = _autocast(x, w1, b1, w2, b2, residual)
    keep = _needs_grad(x, w1, b1, w2, b2, residual)
    if not keep and (kernel := backends.direct_kernel("dense_mlp", x)):
        return kernel(x, w1, b1, w2, b2, activation, epsilon=epsilon, residual=residual)
    x = _normalized(x, epsilon)
    y = _OPS.dense_mlp(x, w1, b1, w2, b2, activation, keep)
    return y if residual is None else y + residual


def low_rank_attention(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    num_heads: int,
    scale: float,
    attn_mask: Tensor | None = None,
    *,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """concat_h[softmax(q_h k_hᵀ · scale + mask) v_h] Woᵀ + bo (+ residual), from x̂.

    x (B, N, d), wq and wk (H·rq, d), wv (H·rv, d), wo (out, H·rv), rows head by head; attn_mask
    broadcasts to (B, H, N, N), bool (True = keep) or additive. x̂ is x, or with an ``epsilon`` its
    layer norm without weight and bias.
    """
    x, wq, bq, wk, wv, wo, bo, attn_mask, residual = _autocast(
        x, wq, bq, wk, wv, wo, bo, attn_mask, residual
    )
    keep = _needs_grad(x, wq, bq, wk, wv, wo, bo, attn_mask, residual)
    if not keep and (kernel := backends.direct_kernel("low_rank_attention", x)):
        return kernel(x, wq, bq, wk, wv, wo, bo, num_heads, scale, attn_mask, epsilon=epsilon,
                      residual=residual)[0]
    x = _normalized(x, epsilon)
    y = _OPS.low_rank_attention(
        x, wq, bq, wk, wv, wo, bo, num_heads, scale, attn_mask, keep
    )[0]
    return y if residual is None else y + residual


def _check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise UserError(
            f"unknown activation '{activation}'; choose one of {', '.join(ACTIVATIONS)} or None"
        )


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on for their device; float64 stays."""
    if tensors[0].is_cpu and not torch.is_autocast_enabled("cpu"):
        return tensors  # at once: it is asked at every call
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _normalized(x: Tensor, epsilon: float | None) -> Tensor:
    return x if epsilon is None else F.layer_norm(x, x.shape[-1:], eps=epsilon)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
