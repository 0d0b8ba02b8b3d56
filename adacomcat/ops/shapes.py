"""The contract of every op's arguments and the number of its operations, read by ``registry``.

A contract raises a RuntimeError that names the wrong argument, and returns
the shapes of the op's results: first those that can be differentiated, then the intermediates that
a backward pass reuses. It runs before every implementation of an op and on fake tensors. Compiled
kernels that are called directly check only that they read no foreign memory; where they refuse,
``backends`` runs the contract for the message.

Flops count two for each multiply-add, from the shapes of the arguments.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
Shapes = list[Shape]


def require(condition: Any, message: Callable[[], str]) -> None:
    """``torch._check`` for conditions that may be symbolic.

    A condition that is simply True returns at once: ``torch._check`` itself takes longer than a
    small kernel.
    """
    if condition is not True:
        torch._check(condition, message)


def _require_like(x: Tensor, **tensors: Tensor | None) -> None:
    """Equal dtype and device."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _require_dtype("x", x, name, tensor)
            require(tensor.device == x.device,
                    lambda n=name, t=tensor: f"{n} is on {t.device} and x is on {x.device}")


def _require_dtype(first: str, x: Tensor, name: str, tensor: Tensor) -> None:
    require(tensor.dtype == x.dtype,
            lambda: f"{name} is {tensor.dtype} and {first} is {x.dtype}: cast one of them")


def _require_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is None:
        return

    def message() -> str:
        return f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}"

    require(tensor.dim() == len(shape), message)
    for size, expected in zip(tensor.shape, shape, strict=True):
        require(size == expected, message)


def _require_matrices(**tensors: Tensor) -> None:
    require(all(tensor.dim() == 2 for tensor in tensors.values()),
            lambda: f"{', '.join(tensors)} must be matrices")


def _require_factors(width: int, v: Tensor, u: Tensor, bias: Tensor | None,
                     names: tuple[str, str, str]) -> None:
    """V (width, r), U (out, r) and a bias (out,), under the names of the op's arguments."""
    name_v, name_u, name_bias = names
    _require_matrices(**{name_v: v, name_u: u})
    _require_shape(name_v, v, width, v.shape[1])
    _require_shape(name_u, u, u.shape[0], v.shape[1])
    _require_shape(name_bias, bias, u.shape[0])


def _require_dense(width: int, weight: Tensor, bias: Tensor | None,
                   names: tuple[str, str]) -> None:
    """A weight (out, width) and a bias (out,)."""
    _require_shape(names[0], weight, weight.shape[0], width)
    _require_shape(names[1], bias, weight.shape[0])


def _require_input(x: Tensor) -> None:
    require(x.dim() > 0, lambda: "x must have at least one dimension (..., in)")
    require(x.is_floating_point(), lambda: f"x must be floating point, got {x.dtype}")


def residual(x: Tensor, residual: Tensor | None, out: Shape) -> None:
    """The tensor that is added to a result of shape ``out`` of an op on x."""
    _require_like(x, residual=residual)
    _require_shape("residual", residual, *out)


def _with_last(x: Tensor, *sizes: int) -> Shapes:
    """Shapes like x's with other last sizes."""
    return [(*x.shape[:-1], size) for size in sizes]


# Fused ops.


def low_rank_linear(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, activation: str | None,
                    residual: Tensor | None) -> Shapes:
    _require_input(x)
    _require_like(x, v=v, u=u, bias=bias, residual=residual)
    _require_factors(x.shape[-1], v, u, bias, ("v", "u", "bias"))
    out, middle = _with_last(x, u.shape[0], v.shape[1])
    _require_shape("residual", residual, *out)
    return [out, middle]


def gated_low_rank_linear(x: Tensor, v: Tensor, gate: Tensor, u: Tensor,
                          bias: Tensor | None) -> Shapes:
    _require_input(x)
    _require_like(x, v=v, gate=gate, u=u, bias=bias)
    _require_factors(x.shape[-1], v, u, bias, ("v", "u", "bias"))
    _require_shape("gate", gate, v.shape[1])
    return _with_last(x, u.shape[0], v.shape[1])


def low_rank_mlp(x: Tensor, v1: Tensor, u1: Tensor, b1: Tensor | None, v2: Tensor, u2: Tensor,
                 b2: Tensor | None, activation: str | None) -> Shapes:
    _require_input(x)
    _require_like(x, v1=v1, u1=u1, b1=b1, v2=v2, u2=u2, b2=b2)
    _require_factors(x.shape[-1], v1, u1, b1, ("v1", "u1", "b1"))
    _require_factors(u1.shape[0], v2, u2, b2, ("v2", "u2", "b2"))
    return _with_last(x, u2.shape[0], v1.shape[1], v2.shape[1])


def dense_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
              activation: str | None) -> Shapes:
    _require_input(x)
    _require_like(x, w1=w1, b1=b1, w2=w2, b2=b2)
    _require_matrices(w1=w1, w2=w2)
    _require_dense(x.shape[-1], w1, b1, ("w1", "b1"))
    _require_dense(w1.shape[0], w2, b2, ("w2", "b2"))
    return _with_last(x, w2.shape[0])


def low_rank_attention(x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor, wv: Tensor,
                       wo: Tensor, bo: Tensor | None, num_heads: int, scale: float,
                       attn_mask: Tensor | None) -> Shapes:
    _require_attention(x, wq, bq, wk, wv, wo, bo, num_heads)
    _require_mask(x, attn_mask)
    return _with_last(x, wo.shape[0], wq.shape[0], wq.shape[0], wv.shape[0], wv.shape[0])


def _require_mask(x: Tensor, attn_mask: Tensor | None) -> None:
    if attn_mask is None:
        return
    if attn_mask.dtype != torch.bool:
        _require_like(x, attn_mask=attn_mask)
    require(attn_mask.dim() <= 4, lambda: "attn_mask must broadcast to (B, H, N, N)")


def _require_attention(x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor, wv: Tensor,
                       wo: Tensor, bo: Tensor | None, num_heads: int) -> None:
    _require_heads(x, wq, bq, wk, wv, wo, bo, num_heads)
    _require_dense(x.shape[2], wq, bq, ("wq", "bq"))
    _require_shape("wk", wk, wq.shape[0], x.shape[2])


def _require_heads(x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor, wv: Tensor,
                   wo: Tensor, bo: Tensor | None, num_heads: int) -> None:
    """All but the shapes of the projections of queries and keys."""
    _require_input(x)
    _require_like(x, wq=wq, bq=bq, wk=wk, wv=wv, wo=wo, bo=bo)
    require(x.dim() == 3, lambda: f"x must be (B, N, d), got {tuple(x.shape)}")
    _require_matrices(wq=wq, wk=wk, wv=wv, wo=wo)
    for name, rows in (("wq and wk", wq.shape[0]), ("wv", wv.shape[0])):
        require(num_heads > 0 and rows % num_heads == 0,
                lambda n=name, r=rows: f"the {r} rows of {n} do not split into {num_heads} heads")
    _require_shape("wv", wv, wv.shape[0], x.shape[2])
    _require_dense(wv.shape[0], wo, bo, ("wo", "bo"))


def low_rank_flops(x: Shape, v: Shape, u: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x[:-1]) * v[1] * (v[0] + u[0])


def gated_flops(x: Shape, v: Shape, gate: Shape, u: Shape, *_: Any, **__: Any) -> int:
    return low_rank_flops(x, v, u)


def low_rank_mlp_flops(x: Shape, v1: Shape, u1: Shape, b1: Shape | None, v2: Shape, u2: Shape,
                       *_: Any, **__: Any) -> int:
    return low_rank_flops(x, v1, u1) + low_rank_flops((*x[:-1], v2[0]), v2, u2)


def dense_mlp_flops(x: Shape, w1: Shape, b1: Shape | None, w2: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x[:-1]) * (prod(w1) + prod(w2))


def attention_flops(x: Shape, wq: Shape, bq: Shape | None, wk: Shape, wv: Shape, wo: Shape,
                    *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * (_projection_sizes(x, wq, wk, wv, wo) + x[1] * (wq[0] + wv[0]))


def _projection_sizes(x: Shape, wq: Shape, wk: Shape, wv: Shape, wo: Shape) -> int:
    return (wq[0] + wk[0] + wv[0]) * x[2] + wo[0] * wo[1]


# Ops of ``inference``.


def gated_mlp(x: Tensor, v1: Tensor | None, wg: Tensor, bg: Tensor | None, w1: Tensor,
              b1: Tensor | None, v2: Tensor | None, w2: Tensor, b2: Tensor | None,
              activation: str | None) -> Shapes:
    _require_input(x)
    _require_like(x, v1=v1, wg=wg, bg=bg, w1=w1, b1=b1, v2=v2, w2=w2, b2=b2)
    _require_matrices(wg=wg, w1=w1, w2=w2)
    inner = _require_factor("v1", v1, x.shape[-1])
    _require_dense(inner, wg, bg, ("wg", "bg"))
    _require_dense(inner, w1, b1, ("w1", "b1"))
    _require_shape("w1", w1, wg.shape[0], inner)
    _require_dense(_require_factor("v2", v2, wg.shape[0]), w2, b2, ("w2", "b2"))
    return _with_last(x, w2.shape[0])


def _require_factor(name: str, v: Tensor | None, width: int) -> int:
    """What stands behind a first factor (width, rank) that may be missing: its rank, or width."""
    if v is None:
        return width
    _require_matrices(**{name: v})
    _require_shape(name, v, width, v.shape[1])
    return v.shape[1]


def gated_mlp_flops(x: Shape, v1: Shape | None, wg: Shape, bg: Shape | None, w1: Shape,
                    b1: Shape | None, v2: Shape | None, w2: Shape, *_: Any, **__: Any) -> int:
    weights = (wg, w1, w2, *(v for v in (v1, v2) if v is not None))
    return 2 * prod(x[:-1]) * sum(map(prod, weights))


def rotary_attention(x: Tensor, vq: Tensor | None, wq: Tensor, bq: Tensor | None,
                     vk: Tensor | None, wk: Tensor, bk: Tensor | None, wv: Tensor, wo: Tensor,
                     bo: Tensor | None, num_heads: int, scale: float, sin: Tensor | None,
                     cos: Tensor | None, half: bool, attn_mask: Tensor | None) -> Shapes:
    _require_heads(x, wq, bq, wk, wv, wo, bo, num_heads)
    for letter, v, w, b in (("q", vq, wq, bq), ("k", vk, wk, bk)):
        _require_like(x, **{f"v{letter}": v, f"b{letter}": b})
        width = _require_factor(f"v{letter}", v, x.shape[2])
        _require_dense(width, w, b, (f"w{letter}", f"b{letter}"))
    _require_shape("wk", wk, wq.shape[0], wk.shape[1])
    _require_angles(x, sin, cos, wq.shape[0] // num_heads)
    _require_mask(x, attn_mask)
    return _with_last(x, wo.shape[0])


def _require_angles(x: Tensor, sin: Tensor | None, cos: Tensor | None, head_dim: int) -> None:
    require((sin is None) == (cos is None), lambda: "sin and cos must come together")
    if sin is None or cos is None:
        return
    _require_dtype("sin", sin, "cos", cos)
    for name, tensor in (("sin", sin), ("cos", cos)):
        require(tensor.device == x.device,
                lambda n=name, t=tensor: f"{n} is on {t.device} and x is on {x.device}")
    require(sin.is_floating_point(), lambda: f"sin must be floating point, got {sin.dtype}")
    require(sin.shape == cos.shape,
            lambda: f"cos must have sin's shape {tuple(sin.shape)}, got {tuple(cos.shape)}")
    require(2 <= sin.dim() <= 4 and sin.shape[-1] == head_dim and head_dim % 2 == 0
            and sin.shape[-2] <= x.shape[1],
            lambda: f"sin must broadcast to (B, H, P, {head_dim}) with at most {x.shape[1]} tokens "
                    f"P and an even last size, got {tuple(sin.shape)}")


def rotary_attention_flops(x: Shape, vq: Shape | None, wq: Shape, bq: Shape | None,
                           vk: Shape | None, wk: Shape, bk: Shape | None, wv: Shape, wo: Shape,
                           *_: Any, **__: Any) -> int:
    factors = sum(prod(v) for v in (vq, vk) if v is not None)
    weights = factors + prod(wq) + prod(wk) + prod(wv) + prod(wo)
    return 2 * x[0] * x[1] * (weights + x[1] * (wq[0] + wv[0]))


def class_attention(x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor, wv: Tensor, wo: Tensor,
                    bo: Tensor | None, num_heads: int, scale: float, epsilon: float) -> Shapes:
    _require_attention(x, wq, bq, wk, wv, wo, bo, num_heads)
    _require_shape("wo", wo, x.shape[2], wv.shape[0])
    return [(x.shape[0], 1, x.shape[2])]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Shapes:
    _require_input(x)
    _require_like(x, weight=weight, bias=bias)
    _require_matrices(weight=weight)
    _require_dense(x.shape[-1], weight, bias, ("weight", "bias"))
    return _with_last(x, weight.shape[0])


def patch_embedding(image: Tensor, weight: Tensor, bias: Tensor | None, prefix: Tensor | None,
                    positions: Tensor | None) -> Shapes:
    require(image.dim() == 4 and weight.dim() == 4,
            lambda: "image must be (B, C, H, W) and weight (out, C, h, w), got "
                    f"{tuple(image.shape)} and {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("prefix", prefix),
                         ("positions", positions)):
        if tensor is not None:
            _require_dtype("image", image, name, tensor)
    out, height, width = weight.shape[0], weight.shape[2], weight.shape[3]
    patches = image.shape[2] // height * (image.shape[3] // width)
    _require_shape("weight", weight, out, image.shape[1], height, width)
    _require_shape("bias", bias, out)
    tokens = 0
    if prefix is not None:
        require(prefix.dim() == 2, lambda: f"prefix must be a matrix, got {tuple(prefix.shape)}")
        _require_shape("prefix", prefix, prefix.shape[0], out)
        tokens = prefix.shape[0]
    _require_shape("positions", positions, patches, out)
    return [(image.shape[0], tokens + patches, out)]


def class_attention_flops(x: Shape, wq: Shape, bq: Shape | None, wk: Shape, wv: Shape, wo: Shape,
                          bo: Shape | None, num_heads: int, *_: Any, **__: Any) -> int:
    return 2 * x[0] * (_projection_sizes(x, wq, wk, wv, wo) + 2 * num_heads * x[1] * x[2])


def linear_flops(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[0]


def patch_embedding_flops(image: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    out, channels, height, width = weight
    patches = image[2] // height * (image[3] // width)
    return 2 * image[0] * patches * out * channels * height * width


# Decompositions.


def _require_matrix(name: str, a: Tensor) -> None:
    require(a.dim() >= 2,
            lambda: f"{name} must be a matrix or a batch of them, got shape {tuple(a.shape)}")
    require(a.dtype in (torch.float32, torch.float64),
            lambda: f"{name} is {a.dtype}; cast it to float32 or float64")


def _triple(lead: list[int], m: int, n: int, k: int, limit: int) -> Shapes:
    """Shapes of u, s and v; k must not exceed the limit."""
    require(0 <= k <= limit, lambda: f"k must lie in 0 … {limit}, got {k}")
    return [(*lead, m, k), (*lead, k), (*lead, n, k)]


def rank_limit(a: Tensor, b: Tensor) -> int:
    """The largest rank that a bᵀ can have."""
    return min(a.shape[-2], b.shape[-2], a.shape[-1])


def batched_svd(a: Tensor, k: int) -> Shapes:
    _require_matrix("a", a)
    *lead, m, n = a.shape
    return _triple(lead, m, n, k, min(m, n))


low_rank_approximation = batched_svd


def factored_svd(a: Tensor, b: Tensor, k: int) -> Shapes:
    _require_matrix("a", a)
    _require_matrix("b", b)
    _require_dtype("a", a, "b", b)
    *lead, m, r = a.shape
    n = b.shape[-2]
    require(tuple(b.shape) == (*lead, n, r),
            lambda: f"b must have shape {(*lead, 'n', r)}, got {tuple(b.shape)}")
    return _triple(lead, m, n, k, rank_limit(a, b))


def truncation_errors(s: Tensor) -> Shapes:
    _require_matrix("s", s)
    return [(*s.shape[:-2], s.shape[-1] + 1)]


def require_distinct(s: Tensor, k: int, zero: bool) -> Shapes:
    return [tuple(s.shape)]


def gram(a: Tensor) -> Shapes:
    _require_matrix("a", a)
    return [(*a.shape[:-2], a.shape[-1], a.shape[-1])]


def eigenvalues(a: Tensor) -> Shapes:
    _require_matrix("a", a)
    require(a.shape[-2] == a.shape[-1],
            lambda: f"a must be square, (..., n, n), got {tuple(a.shape)}")
    return [tuple(a.shape[:-1])]


def singular_values(a: Tensor) -> Shapes:
    _require_matrix("a", a)
    return [(*a.shape[:-2], min(a.shape[-2:]))]
