"""Ops that only `optimize` uses, for inference: C++ kernels on CPUs, else the formula.

The formula serves too where a gradient, autocast or a trace wants what it consists of.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adacomcat.ops import backends

FEW_ROWS = 4  # what the kernel takes: of more rows a product is faster
_LIBRARY = torch.library.Library("adacomcat", "FRAGMENT")


def first_token_attention(
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
    """The first token of x + low_rank_attention(x, ..., epsilon=epsilon): (B, 1, d).

    No token has a key or a value: logits are x̂ (wk_hᵀ q_h), and values wv_h (x̂ᵀ p_h), so a weight
    is multiplied by single vectors only. Arguments as of ``low_rank_attention``.
    """
    arguments = (x, wq, bq, wk, wv, wo, bo, num_heads, scale, epsilon)
    kernel = _kernel("class_attention", *arguments) or _first_token_attention
    return kernel(*arguments)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias), on threads that share out the weight's rows.

    x (..., in), of at most four rows for the kernel, weight (out, in), bias (out,).
    """
    kernel = None
    if x.shape[:-1].numel() <= FEW_ROWS:
        kernel = _kernel("linear", x, weight, bias)
    return (kernel or F.linear)(x, weight, bias)


def patch_embedding(image: Tensor, weight: Tensor, bias: Tensor | None,
                    prefix: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """F.conv2d(image, weight, bias, stride=(h, w)).flatten(2).mT + positions, after a prefix.

    image (B, C, H, W), weight (out, C, h, w) for patches that do not overlap, prefix (n, out),
    positions (patches, out) → (B, n + patches, out).
    """
    kernel = _kernel("patch_embedding", image, weight, bias, prefix, positions)
    if kernel is None or weight.shape[-1] % 2:
        kernel = _patch_embedding
    return kernel(image, weight, bias, prefix, positions)


def _kernel(op: str, x: Tensor, *others: Any) -> Callable[..., Tensor] | None:
    wants_grad = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (x, *others))
    if wants_grad or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    return backends.direct_kernel(op, x)


def _first_token_attention(x, wq, bq, wk, wv, wo, bo, num_heads, scale, epsilon) -> Tensor:
    def per_head(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (num_heads, -1))  # (H, r, d)

    normed = F.layer_norm(x, x.shape[-1:], eps=epsilon)
    q = F.linear(normed[:, 0], wq, bq).unflatten(-1, (num_heads, -1))
    directions = torch.einsum("bhr,hrd->bhd", q, per_head(wk))
    p = (directions @ normed.mT * scale).softmax(-1)  # (B, H, N)
    heads = torch.einsum("bhd,hrd->bhr", p @ normed, per_head(wv))
    return x[:, :1] + F.linear(heads.flatten(1), wo, bo).unsqueeze(1)


def _patch_embedding(image, weight, bias, prefix, positions) -> Tensor:
    # On an H200 cuDNN's convolution was a fifth of a whole DeiT-S of 64 images in bfloat16.
    if image.is_cuda:
        tokens = F.linear(patches(image, *weight.shape[2:]), weight.flatten(1), bias)
    else:
        tokens = F.conv2d(image, weight, bias, stride=weight.shape[2:]).flatten(2).mT
    if positions is not None:
        tokens = tokens + positions
    return tokens if prefix is None else torch.cat(
        [prefix.to(tokens).expand(len(tokens), -1, -1), tokens], 1)


def patches(image: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) → (B, H/height · W/width, C · height · width), without what is left over."""
    b, channels, rows, columns = image.shape
    down, across = rows // height, columns // width
    image = image[:, :, :down * height, :across * width]
    image = image.reshape(b, channels, down, height, across, width).permute(0, 2, 4, 1, 3, 5)
    return image.reshape(b, down * across, -1)


def _flops_first_token_attention(x, wq, bq, wk, wv, wo, bo, num_heads, *_, **__) -> int:
    projections = wq[0] * x[2] + wk[0] * x[2] + wv[0] * x[2] + wo[0] * wo[1]
    return 2 * x[0] * (projections + 2 * num_heads * x[1] * x[2])


def _flops_few_rows_linear(x, weight, *_, **__) -> int:
    return 2 * prod(x) * weight[0]


def _flops_patch_embedding(image, weight, *_, **__) -> int:
    out, channels, height, width = weight
    patches = image[2] // height * (image[3] // width)
    return 2 * image[0] * patches * out * channels * height * width


def _register(name: str, arguments: str, shape: Callable[..., tuple[int, ...]],
              flops: Callable[..., int]) -> None:
    _LIBRARY.define(f"{name}({arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"adacomcat::{name}", lambda x, *a: x.new_empty(shape(x, *a)),
                                lib=_LIBRARY)
    register_flop_formula(getattr(torch.ops.adacomcat, name))(flops)


_register(
    "class_attention_cpu",
    "Tensor x, Tensor wq, Tensor? bq, Tensor wk, Tensor wv, Tensor wo, Tensor? bo, "
    "int num_heads, float scale, float epsilon",
    lambda x, *_: (x.shape[0], 1, x.shape[2]),
    _flops_first_token_attention,
)
_register(
    "linear_cpu",
    "Tensor x, Tensor weight, Tensor? bias",
    lambda x, weight, _: (*x.shape[:-1], weight.shape[0]),
    _flops_few_rows_linear,
)
_register(
    "patch_embedding_cpu",
    "Tensor image, Tensor weight, Tensor? bias, Tensor? prefix, Tensor? positions",
    lambda image, weight, bias, prefix, positions: (
        image.shape[0],
        (0 if prefix is None else prefix.shape[0])
        + image.shape[2] // weight.shape[2] * (image.shape[3] // weight.shape[3]),
        weight.shape[0],
    ),
    _flops_patch_embedding,
)
