"""Ops for inference alone, which ``optimize`` puts into models: C++ kernels on CPUs; two of them
also have Triton kernels for GPUs.

The formulas serve wherever a kernel cannot: in float64, under autocast, in a trace, and where a
gradient follows, which then passes through the formula. No backend is refused here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adacomcat.ops import backends, reference, transforms

__all__ = ["GEMV_ROWS", "class_attention", "gated_mlp", "linear", "patch_embedding", "patches",
           "rotary_attention"]

# The most rows that the gemv kernel takes; with more rows a matrix product is faster.
GEMV_ROWS = 4


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
    *,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """(act(x̄ Wgᵀ + bg) · (x̄ W1ᵀ + b1)) V2 W2ᵀ + b2 (+ residual), x̄ = x̂ V1: SwiGLU and its like.

    Args:
        x: (..., in).
        v1: V1, (in, r1), the first factor of both the gate and W1; None where they are dense.
        wg: Wg, the gate, (hidden, r1), or (hidden, in) without v1.
        bg: (hidden,) or None.
        w1: W1, of the gate's shape.
        b1: (hidden,) or None.
        v2: V2, (hidden, r2); None where the last projection is dense.
        w2: W2, (out, r2), or (out, hidden) without v2.
        b2: (out,) or None.
        activation: 'gelu', 'gelu_tanh', 'silu', 'relu', 'quick_gelu' or None for the identity.
        epsilon: As in ``low_rank_mlp``.
        residual: (..., out), added last.

    Returns:
        (..., out), in x's dtype.

    Raises:
        RuntimeError: A shape, dtype or device does not fit; the message names the argument.
    """
    arguments = (x, v1, wg, bg, w1, b1, v2, w2, b2, activation)
    return _sublayer("gated_mlp", arguments, epsilon, residual)


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
    *,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """concat_h[softmax(R q_h (R k_h)ᵀ · scale + mask) v_h] Woᵀ + bo (+ residual), R a rotation.

    q = (x̂ Vq) Wqᵀ + bq, k = (x̂ Vk) Wkᵀ + bk, v = x̂ Wvᵀ. The rotation by the position of each token
    stands between queries and keys, so they do not fold, and a bias of the keys does not cancel.

    Args:
        x: (B, N, d).
        vq: Vq, (d, rank), the first factor of low-rank queries; None where they are dense.
        wq: Wq, (H·head_dim, rank), or (H·head_dim, d) without vq; rows head by head.
        bq: (H·head_dim,) or None.
        vk: Vk, (d, rank) or None.
        wk: Wk, (H·head_dim, rank or d).
        bk: (H·head_dim,) or None.
        wv: Wv, (H·rank_vo, d).
        wo: Wo, (out, H·rank_vo).
        bo: (out,) or None.
        num_heads: H.
        scale: Factor of the logits.
        sin: Broadcasts to (B, H, P, head_dim): the last P tokens turn, those before do not. None
            where nothing turns.
        cos: Of the same shape and dtype; with sin or not at all.
        half: Whether elements j and j + head_dim / 2 turn together, else 2 j and 2 j + 1.
        attn_mask: As in ``low_rank_attention``.
        epsilon: As in ``low_rank_attention``.
        residual: (B, N, out), added last.

    Returns:
        (B, N, out), in x's dtype.

    Raises:
        RuntimeError: A shape, dtype or device does not fit; the message names the argument.
    """
    arguments = (x, vq, wq, bq, vk, wk, bk, wv, wo, bo, num_heads, scale, sin, cos, half,
                 attn_mask)
    return _sublayer("rotary_attention", arguments, epsilon, residual,
                     takes=sin is None or sin.dtype in backends.KERNEL_DTYPES)


def class_attention(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    num_heads: int,
    scale: float,
    epsilon: float,
) -> Tensor:
    """The class token of x + low_rank_attention(x, …, epsilon=epsilon), and no other token.

    No token gets a key or a value. The logits are x̂ (wk_hᵀ q_h) and the values wv_h (x̂ᵀ p_h), so
    weights are multiplied by single vectors only. Only the class token queries, as in the class
    attention of CaiT (arXiv 2103.17239).

    Args:
        x: (B, N, d), the class token first.
        wq: (H·rank_qk, d), rows head by head; the other weights as in ``low_rank_attention``.
        bq: (H·rank_qk,) or None.
        wk: (H·rank_qk, d).
        wv: (H·rank_vo, d).
        wo: (d, H·rank_vo).
        bo: (d,) or None.
        num_heads: H.
        scale: Factor of the logits.
        epsilon: Of the layer norm, without weight and bias, that gives x̂ from x.

    Returns:
        (B, 1, d).

    Raises:
        RuntimeError: A shape, dtype or device does not fit; the message names the argument.
    """
    arguments = (x, wq, bq, wk, wv, wo, bo, num_heads, scale, epsilon)
    kernel = _kernel("class_attention", *arguments) or _class_attention
    return kernel(*arguments)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, for up to ``GEMV_ROWS`` rows by a gemv whose threads share out the weight's rows.

    Args:
        x: (..., in).
        weight: W, (out, in).
        bias: b, (out,) or None.

    Returns:
        (..., out).

    Raises:
        RuntimeError: A shape, dtype or device does not fit; the message names the argument.
    """
    kernel = _kernel("linear", x, weight, bias)
    # Asked last: an export keeps the size of a batch that somebody looked at.
    if kernel is not None and x.shape[:-1].numel() > GEMV_ROWS:
        kernel = None
    return (kernel or F.linear)(x, weight, bias)


def patch_embedding(image: Tensor, weight: Tensor, bias: Tensor | None,
                    prefix: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """F.conv2d(image, weight, bias, stride=(h, w)).flatten(2).mT + positions, after a prefix.

    Args:
        image: (B, C, H, W); rows and columns that fill no patch are left out.
        weight: (out, C, h, w), for patches that do not overlap.
        bias: (out,) or None.
        prefix: (n, out), tokens that every image has before its patches.
        positions: (patches, out), added to the patches.

    Returns:
        (B, n + patches, out).

    Raises:
        RuntimeError: A shape, dtype or device does not fit; the message names the argument.
    """
    kernel = _kernel("patch_embedding", image, weight, bias, prefix, positions)
    if kernel is None or weight.shape[-1] % 2:
        kernel = _patch_embedding
    return kernel(image, weight, bias, prefix, positions)


def _sublayer(op: str, arguments: tuple[Any, ...], epsilon: float | None, residual: Tensor | None,
              takes: bool = True) -> Tensor:
    """residual + op(x̂, …) by the kernel, where it takes the arguments, or by the formula."""
    kernel = _kernel(op, *arguments, residual)
    if kernel is not None and takes:
        return kernel(*arguments, epsilon=epsilon, residual=residual)
    x, *others = arguments
    normed = x if epsilon is None else F.layer_norm(x, x.shape[-1:], eps=epsilon)
    y = getattr(reference, op)(normed, *others)
    return y if residual is None else y + residual


def runs_kernel(op: str, x: Tensor) -> bool:
    """Whether a kernel would run ``op`` on what is like x, without gradients."""
    return _kernel(op, x.detach()) is not None


def _kernel(op: str, x: Tensor, *others: Any) -> backends.Kernel | None:
    wants_grad = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (x, *others))
    if wants_grad or (torch.is_autocast_enabled("cpu") if x.is_cpu
                      else transforms.autocast_is_on(x.device.type)):
        return None
    if not x.is_cpu:
        asked = None if transforms.watched() else backends.in_use()
        if asked is not None and backends.refusal(asked, op, x) is not None:
            return None
    return backends.direct_kernel(op, x)


def _class_attention(x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor, wv: Tensor, wo: Tensor,
                     bo: Tensor | None, num_heads: int, scale: float, epsilon: float) -> Tensor:
    def per_head(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (num_heads, -1))  # (H, r, d)

    normed = F.layer_norm(x, x.shape[-1:], eps=epsilon)
    q = F.linear(normed[:, 0], wq, bq).unflatten(-1, (num_heads, -1))
    directions = torch.einsum("bhr,hrd->bhd", q, per_head(wk))
    p = (directions @ normed.transpose(1, 2) * scale).softmax(-1)  # (B, H, N)
    heads = torch.einsum("bhd,hrd->bhr", p @ normed, per_head(wv))
    return x[:, :1] + F.linear(heads.flatten(1), wo, bo).unsqueeze(1)


def _patch_embedding(image: Tensor, weight: Tensor, bias: Tensor | None, prefix: Tensor | None,
                     positions: Tensor | None) -> Tensor:
    # On an H200 cuDNN's convolution took a fifth of the time of a DeiT-S on 64 images in bfloat16.
    height, width = weight.shape[2:]
    if image.is_cuda:
        tokens = F.linear(patches(image, height, width), weight.flatten(1), bias)
    else:
        tokens = F.conv2d(image, weight, bias, stride=(height, width)).flatten(2).transpose(1, 2)
    if positions is not None:
        tokens = tokens + positions
    return tokens if prefix is None else torch.cat(
        [prefix.to(tokens).expand(tokens.shape[0], -1, -1), tokens], 1)


def patches(image: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) → (B, H/height · W/width, C · height · width), without rows and columns that
    fill no patch."""
    b, channels, rows, columns = image.shape
    down, across = rows // height, columns // width
    image = image[:, :, :down * height, :across * width]
    image = image.reshape(b, channels, down, height, across, width).permute(0, 2, 4, 1, 3, 5)
    return image.reshape(b, down * across, -1)
