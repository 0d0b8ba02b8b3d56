"""The fused ops as public functions. ``registry`` says how each call runs, ``backends`` where.

All take float32, bfloat16, float16 and, without kernels, float64; x in any layout. They have
gradients of any order, obey autocast, and trace with ``torch.compile(fullgraph=True)``.
"""

from torch import Tensor

from adacomcat.errors import UserError
from adacomcat.ops.reference import ACTIVATIONS
from adacomcat.ops.registry import OPS

__all__ = ["dense_mlp", "gated_low_rank_linear", "low_rank_attention", "low_rank_linear",
           "low_rank_mlp"]

_LOW_RANK_LINEAR = OPS["low_rank_linear"]
_GATED_LOW_RANK_LINEAR = OPS["gated_low_rank_linear"]
_LOW_RANK_MLP = OPS["low_rank_mlp"]
_DENSE_MLP = OPS["dense_mlp"]
_LOW_RANK_ATTENTION = OPS["low_rank_attention"]


def low_rank_linear(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act((x V) Uᵀ + b) + residual, a linear layer of weight U Vᵀ. The (..., r) middle stays on
    chip.

    Args:
        x: (..., in).
        v: V, (in, r).
        u: U, (out, r).
        bias: b, (out,).
        activation: 'gelu', 'gelu_tanh', 'silu', 'relu', 'quick_gelu' or None for the identity.
        residual: (..., out), added last.

    Returns:
        (..., out), contiguous, in x's dtype.

    Raises:
        UserError: The activation is unknown, or the backend in use cannot run the op.
        RuntimeError: A shape, dtype or device does not fit; the message names the argument.
    """
    _check_activation(activation)
    return _LOW_RANK_LINEAR(x, v, u, bias, activation, residual)


def gated_low_rank_linear(
    x: Tensor, v: Tensor, gate: Tensor, u: Tensor, bias: Tensor | None = None
) -> Tensor:
    """((x V) * gate) Uᵀ + b: the mixture of low-rank layers of a rank search, in one pass.

    With weights mᵢ of candidate ranks rᵢ, gate_j = Σ mᵢ over the candidates rᵢ > j gives
    Σᵢ mᵢ (x V_{:rᵢ}) U_{:rᵢ}ᵀ + b (ComCAT, arXiv 2305.17235, computes each candidate alone).

    Args:
        x: (..., in).
        v: V, (in, r).
        gate: (r,), one factor for each rank-one term.
        u: U, (out, r).
        bias: b, (out,).

    Returns:
        (..., out), contiguous, in x's dtype.

    Raises:
        UserError: The backend in use cannot run the op.
        RuntimeError: A shape, dtype or device does not fit; the message names the argument.
    """
    return _GATED_LOW_RANK_LINEAR(x, v, gate, u, bias)


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
    """(h V2) U2ᵀ + b2 (+ residual) with h = act((x̂ V1) U1ᵀ + b1); h is never written to memory.

    Args:
        x: (..., in).
        v1: V1, (in, r1).
        u1: U1, (hidden, r1).
        b1: (hidden,) or None.
        v2: V2, (hidden, r2).
        u2: U2, (out, r2).
        b2: (out,) or None.
        activation: 'gelu', 'gelu_tanh', 'silu', 'relu', 'quick_gelu' or None for the identity.
        epsilon: x̂ is the layer norm of x with this epsilon, without weight and bias; without an
            epsilon x̂ is x.
        residual: (..., out), added last.

    Returns:
        (..., out), contiguous, in x's dtype.

    Raises:
        UserError: The activation is unknown, or the backend in use cannot run the op.
        RuntimeError: A shape, dtype or device does not fit; the message names the argument.
    """
    _check_activation(activation)
    return _LOW_RANK_MLP(x, v1, u1, b1, v2, u2, b2, activation, epsilon=epsilon, residual=residual)


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
    """act(x̂ W1ᵀ + b1) W2ᵀ + b2 (+ residual); the backward pass recomputes the hidden layer.

    Args:
        x: (..., in).
        w1: W1, (hidden, in).
        b1: (hidden,) or None.
        w2: W2, (out, hidden).
        b2: (out,) or None.
        activation: 'gelu', 'gelu_tanh', 'silu', 'relu', 'quick_gelu' or None for the identity.
        epsilon: x̂ is the layer norm of x with this epsilon, without weight and bias; without an
            epsilon x̂ is x.
        residual: (..., out), added last.

    Returns:
        (..., out), contiguous, in x's dtype.

    Raises:
        UserError: The activation is unknown, or the backend in use cannot run the op.
        RuntimeError: A shape, dtype or device does not fit; the message names the argument.
    """
    _check_activation(activation)
    return _DENSE_MLP(x, w1, b1, w2, b2, activation, epsilon=epsilon, residual=residual)


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
    """concat_h[softmax(q_h k_hᵀ · scale + mask) v_h] Woᵀ + bo (+ residual), the folded attention.

    q = x̂ Wqᵀ + bq, k = x̂ Wkᵀ, v = x̂ Wvᵀ. A bias of the keys would cancel in the softmax, one of
    the values belongs into bo. Ranks of queries and values may differ.

    Args:
        x: (B, N, d).
        wq: Wq, (H·rank_qk, d), rows head by head.
        bq: (H·rank_qk,) or None.
        wk: Wk, (H·rank_qk, d).
        wv: Wv, (H·rank_vo, d).
        wo: Wo, (out, H·rank_vo).
        bo: (out,) or None.
        num_heads: H.
        scale: Factor of the logits; that of the dense attention, head_dim^-½ of the dense model.
        attn_mask: Broadcasts to (B, H, N, N); bool (True attends) or additive, in x's dtype.
        epsilon: x̂ is the layer norm of x with this epsilon, without weight and bias; without an
            epsilon x̂ is x.
        residual: (B, N, out), added last.

    Returns:
        (B, N, out), contiguous, in x's dtype. Queries that the mask lets see nothing give bo.

    Raises:
        UserError: The backend in use cannot run the op.
        RuntimeError: A shape, dtype or device does not fit; the message names the argument.
    """
    return _LOW_RANK_ATTENTION(x, wq, bq, wk, wv, wo, bo, num_heads, scale, attn_mask,
                               epsilon=epsilon, residual=residual)


def _check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise UserError(
            f"unknown activation '{activation}'; choose one of {', '.join(ACTIVATIONS)} or None"
        )
