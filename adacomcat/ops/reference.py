"""Every op in a few lines of PyTorch: the oracle of the tests, and the implementation that runs
where no faster one can.

A function returns the op's result, or a tuple of it and the intermediates that the backward pass
reuses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from adacomcat.ops.transforms import by_formula, transformed

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "quick_gelu")
QUICK = 1.702  # of quick_gelu: x sigmoid(1.702 x), as CLIP was trained


def activate(x: Tensor, activation: str | None) -> Tensor:
    """activation(x), elementwise; None is the identity."""
    if activation is None:
        return x
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(QUICK * x)
    raise ValueError(f"unknown activation '{activation}'")


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


def dense_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str | None
) -> Tensor:
    """act(x W1ᵀ + b1) W2ᵀ + b2.  x (..., in), W1 (hidden, in), W2 (out, hidden)."""
    return F.linear(activate(F.linear(x, w1, b1), activation), w2, b2)


def gated_mlp(
    x: Tensor,
    v1: Tensor | None,
    wg: Tensor,
    bg: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    v2: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
) -> Tensor:
    """(act(x̄ Wgᵀ + bg) · (x̄ W1ᵀ + b1)) V2 W2ᵀ + b2, x̄ = x V1.  Without V1 or V2 a side is dense.

    x (..., in), V1 (in, r1), Wg and W1 (hidden, r1), V2 (hidden, r2), W2 (out, r2).
    """
    inner = x if v1 is None else x @ v1
    hidden = activate(F.linear(inner, wg, bg), activation) * F.linear(inner, w1, b1)
    return F.linear(hidden if v2 is None else hidden @ v2, w2, b2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H·r) → (B, H, N, r)."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, r) → (B, N, H·r)."""
    return x.transpose(1, 2).flatten(2)


def broadcast_mask(attn_mask: Tensor | None) -> Tensor | None:
    """A mask with leading dimensions of size 1 up to (B, H, N, N)."""
    if attn_mask is None:
        return None
    return attn_mask[(None,) * (4 - attn_mask.dim())]


def probability(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ · scale + mask), zero in rows that are masked entirely."""
    logits = (q * scale) @ k.transpose(-2, -1)
    if mask is None:
        return logits.softmax(-1)
    if mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    else:
        logits = logits + mask
    empty = (logits == float("-inf")).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, attn_mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ · scale + mask) v for q, k (B, H, N, rq), v (B, H, N, rv) → (B, H, N, rv)."""
    rank_qk, rank_vo = q.shape[-1], v.shape[-1]
    if not torch.compiler.is_compiling() and transformed():
        return probability(q, k, scale, broadcast_mask(attn_mask)) @ v  # fused ones have no rules
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


def rotate(x: Tensor, sin: Tensor, cos: Tensor, half: bool) -> Tensor:
    """The last P tokens of x (B, H, N, h) turned: x · cos + x' · sin, in x's dtype.

    sin and cos broadcast to (B, H, P, h). x' has -b in the place of a and a in that of b, for pairs
    of elements j and j + h / 2 where ``half``, else 2 j and 2 j + 1.
    """
    prefix = x.shape[-2] - sin.shape[-2]
    first, last = x[..., :prefix, :], x[..., prefix:, :]
    if half:
        a, b = last.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    else:
        turned = torch.stack([-last[..., 1::2], last[..., ::2]], -1).flatten(-2)
    return torch.cat([first, (last * cos + turned * sin).to(x.dtype)], -2)


def rotary_attention(
    x: Tensor,
    vq: Tensor | None,
    wq: Tensor,
    bq: Tensor | None,
    vk: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    num_heads: int,
    scale: float,
    sin: Tensor | None,
    cos: Tensor | None,
    half: bool,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """``low_rank_attention`` with q = (x Vq) Wqᵀ + bq and k = (x Vk) Wkᵀ + bk, both rotated.

    Without Vq or Vk the projection is dense; without sin and cos nothing turns.
    """
    q, k = (split_heads(F.linear(x if v is None else x @ v, w, b), num_heads)
            for v, w, b in ((vq, wq, bq), (vk, wk, bk)))
    if sin is not None and cos is not None:
        q, k = rotate(q, sin, cos, half), rotate(k, sin, cos, half)
    heads = attend(q, k, split_heads(F.linear(x, wv), num_heads), scale, attn_mask)
    return F.linear(merge_heads(heads), wo, bo)


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
    heads = attend(split_heads(q, num_heads), split_heads(k, num_heads), split_heads(v, num_heads),
                   scale, attn_mask)
    context = merge_heads(heads)
    return F.linear(context, wo, bo), q, k, v, context


def require_finite_matrices(a: Tensor, name: str = "a") -> None:
    """ValueError naming the first matrix of a batch that holds NaN or infinity."""
    bad = ~torch.isfinite(a).flatten(-2).all(-1).flatten()
    if bad.any():
        raise ValueError(f"matrix {bad.nonzero()[0].item()} of {bad.numel()} in {name} holds NaN "
                         "or infinite values; it has no singular values")


def require_distinct(s: Tensor, k: int, zero: bool) -> None:
    """ValueError where one of the first k singular values equals another (or zero, if asked)."""
    values = torch.cat([s, s.new_zeros(*s.shape[:-1], 1)], -1) if zero else s
    equal = 4 * torch.finfo(s.dtype).eps * s[..., :1].unsqueeze(-1)
    gaps = (values[..., :k, None] - values[..., None, :]).abs()
    same = (gaps <= equal).logical_and(~torch.eye(*gaps.shape[-2:], dtype=torch.bool,
                                                  device=s.device))
    if same.any():
        *batch, i, j = same.nonzero()[0].tolist()
        raise ValueError(
            f"singular values {i} and {j} of matrix {tuple(batch)} are equal, so their vectors "
            "have no gradient; differentiate the singular values only, or a function of the "
            "whole product")


def distinct(s: Tensor, k: int, zero: bool) -> Tensor:
    """s itself, where ``require_distinct`` raises nothing; a copy, as ops return no argument."""
    require_distinct(s, k, zero)
    return s.clone()


def fix_signs(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest element of each left vector (the first of equals) made positive."""
    if u.numel() == 0:
        return u, s, v
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, v * sign


def batched_svd(a: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """a ≈ u diag(s) vᵀ, truncated.  a (..., m, n) → u (..., m, k), s (..., k), v (..., n, k)."""
    require_finite_matrices(a)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return fix_signs(u[..., :k], s[..., :k], vh.mT[..., :k])


def _small_svd(a: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The op, so that the fastest backend computes it, wherever ops may be called."""
    return batched_svd(a, k) if by_formula() else torch.ops.adacomcat.batched_svd(a, k)


def factored_svd(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """a bᵀ ≈ u diag(s) vᵀ by QR of both factors and the SVD of an r × r matrix.

    a (..., m, r), b (..., n, r) → u (..., m, k), s (..., k), v (..., n, k). The small SVD is the
    op, so that the fastest backend computes it.
    """
    require_finite_matrices(a, "a")
    require_finite_matrices(b, "b")
    basis_a, inner_a = torch.linalg.qr(a)
    basis_b, inner_b = torch.linalg.qr(b)
    u, s, v = _small_svd(inner_a @ inner_b.mT, k)
    return fix_signs(basis_a @ u, s, basis_b @ v)


def size(a: Tensor) -> Tensor:
    """The power of two at or below the largest element of each matrix; 1 for zeros.

    a (..., m, n) → (..., 1, 1).
    """
    if a.numel() == 0:
        return a.new_ones(*a.shape[:-2], 1, 1)
    largest = a.detach().abs().amax((-2, -1), keepdim=True)  # powers of two have no derivative
    return (largest / (2 * torch.frexp(largest).mantissa)).where(largest > 0, 1.0)


def low_rank_approximation(a: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """a ≈ u diag(s) vᵀ in float64 by eigenvectors of the smaller Gram matrix.

    a (..., m, n) → u (..., m, k), s (..., k), v (..., n, k). The small SVD is the op, so that the
    fastest backend computes it.
    """
    require_finite_matrices(a, "a")
    wide = a.shape[-2] < a.shape[-1]
    tall = (a.mT if wide else a).double()
    unit = size(tall)
    tall = tall / unit  # the products of its elements neither overflow nor vanish
    right = torch.linalg.eigh(tall.mT @ tall).eigenvectors.flip(-1)[..., :k]
    image = tall @ right  # its columns are nearly orthogonal; QR makes them so
    left, triangle = torch.linalg.qr(image)
    # The triangle is diagonal up to rounding, which its own SVD removes.
    inner_u, s, inner_v = _small_svd(triangle, k)
    u, v = left @ inner_u, right @ inner_v
    u, s, v = fix_signs(*((v, s, u) if wide else (u, s, v)))
    return u.to(a.dtype), (s * unit.squeeze(-1)).to(a.dtype), v.to(a.dtype)


def truncation_errors(s: Tensor) -> Tensor:
    """errors[r] = Σ_h Σ_{i ≥ r} s_hi², smallest first, in float64.  s (..., H, R)."""
    energy = s.double().square().sum(-2)
    tail = energy.flip(-1).cumsum(-1).flip(-1)
    return F.pad(tail, (0, 1)).to(s.dtype)
