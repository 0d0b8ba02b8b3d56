"""Ops for inference alone, which ``optimize`` puts into models: C++ kernels on CPUs.

The formulas serve wherever a kernel cannot: on GPUs, in float64, under autocast, in a trace, and
where a gradient follows, which then passes through the formula.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adacomcat.ops import backends

__all__ = ["GEMV_ROWS", "class_attention", "linear", "patch_embedding", "patches"]

# The most rows that the gemv kernel takes; with more rows a matrix product is faster.
GEMV_ROWS = 4


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


def _kernel(op: str, x: Tensor, *others: Any) -> backends.Kernel | None:
    wants_grad = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (x, *others))
    if wants_grad or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    return backends.direct_kernel(op, x)


def _class_attention(x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor, wv: Tensor, wo: Tensor,
                     bo: Tensor | None, num_heads: int, scale: float, epsilon: float) -> Tensor:
    def per_head(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (num_heads, -1))  # (H, r, d)

    normed = F.layer_norm(x, x.shape[-1:], eps=epsilon)
    q = F.linear(normed[:, 0], wq, bq).unflatten(-1, (num_heads, -1))
    directions = torch.einsum("bhr,hrd->bhd", q, per_head(wk))
    p = (directions @ normed.mT * scale).softmax(-1)  # (B, H, N)
    heads = torch.einsum("bhd,hrd->bhr", p @ normed, per_head(wv))
    return x[:, :1] + F.linear(heads.flatten(1), wo, bo).unsqueeze(1)


def _patch_embedding(image: Tensor, weight: Tensor, bias: Tensor | None, prefix: Tensor | None,
                     positions: Tensor | None) -> Tensor:
    # On an H200 cuDNN's convolution took a fifth of the time of a DeiT-S on 64 images in bfloat16.
    height, width = weight.shape[2:]
    if image.is_cuda:
        tokens = F.linear(patches(image, height, width), weight.flatten(1), bias)
    else:
        tokens = F.conv2d(image, weight, bias, stride=(height, width)).flatten(2).mT
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
