"""Every op in a few lines of PyTorch: the oracle, and what runs where nothing faster can.

Each function returns its result first, then the intermediates that the backward pass reuses.
"""

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")


def activate(x: Tensor, activation: str | None) -> Tensor:
    """activation(x), elementwise; None is the identity."""
    if activation is None:
        return x
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.silu(x) if activation == "silu" else F.relu(x)


def low_rank_linear(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """act((x V) Uᵀ + b) + residual, and x V.  x (..., in), V (in, r), U (out, r)."""
    middle = x @ v
    out = activate(F.linear(middle, u, bias), activation)
    return (out if residual is None else out + residual), middle


def gated_low_rank_linear(
    x: Tensor, v: Tensor, gate: Tensor, u: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """((x V) * gate) Uᵀ + b, and x V.  gate (r,)."""
    middle = x @ v
    return F.linear(middle * gate, u, bias), middle


def low_rank_mlp(
    x: Tensor,
    v1: Tensor,
    u1: Tensor,
    b1: Tensor | None,
    v2: Tensor,
    u2: Tensor,
    b2: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h V2) U2ᵀ + b2 with h = act((x V1) U1ᵀ + b1), and both middles x V1, h V2."""
    hidden, middle1 = low_rank_linear(x, v1, u1, b1, activation)
    out, middle2 = low_rank_linear(hidden, v2, u2, b2)
    return out, middle1, middle2


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H·r) → (B, H, N, r)."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)


def broadcast_mask(attn_mask: Tensor | None) -> Tensor | None:
    """A mask with leading dimensions of size 1 up to (B, H, N, N)."""
    if attn_mask is None:
        return None
    return attn_mask[(None,) * (4 - attn_mask.dim())]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, attn_mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ · scale + mask) v for q, k (B, H, N, rq), v (B, H, N, rv) → (B, H, N, rv)."""
    rank_qk, rank_vo = q.shape[-1], v.shape[-1]
    # PyTorch's fused attention wants one head size: zero columns change neither logits nor sums.
    width = max(rank_qk, rank_vo)
    if rank_qk < width:
        q, k = F.pad(q, (0, width - rank_qk)), F.pad(k, (0, width - rank_qk))
    elif rank_vo < width:
        v = F.pad(v, (0, width - rank_vo))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=broadcast_mask(attn_mask), scale=scale
    )
    return out[..., :rank_vo]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """concat_h[softmax(q_h k_hᵀ · scale + mask) v_h] Woᵀ + bo, and q, k, v and the concatenation.

    x (B, N, d), wq and wk (H·rq, d), wv (H·rv, d), wo (out, H·rv), head-major rows.
    """
    q, k, v = F.linear(x, wq, bq), F.linear(x, wk), F.linear(x, wv)
    heads = attend(*(split_heads(t, num_heads) for t in (q, k, v)), scale, attn_mask)
    context = heads.transpose(1, 2).flatten(2)
    return F.linear(context, wo, bo), q, k, v, context
