"""Arguments of each op → shapes of its result and of the intermediates that it can keep.

Wrong arguments are named. Fake and real implementations of an op both come here, so that both say
the same.
"""

import torch
from torch import Tensor


def _check_like(x: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            torch._check(
                tensor.dtype == x.dtype,
                lambda n=name, t=tensor: f"{n} is {t.dtype} and x is {x.dtype}: cast one of them",
            )
            torch._check(
                tensor.device == x.device,
                lambda n=name, t=tensor: f"{n} is on {t.device} and x is on {x.device}",
            )


def _check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is None:
        return
    message = f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
    torch._check(tensor.dim() == len(shape), lambda: message)
    for size, expected in zip(tensor.shape, shape, strict=True):
        torch._check(size == expected, lambda: message)


def _check_factors(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, suffix: str = "") -> None:
    torch._check(v.dim() == 2 and u.dim() == 2, lambda: f"v{suffix}, u{suffix} must be matrices")
    _check_shape(f"v{suffix}", v, x.shape[-1], v.shape[1])
    _check_shape(f"u{suffix}", u, u.shape[0], v.shape[1])
    _check_shape(f"bias{suffix}", bias, u.shape[0])


def _check_input(x: Tensor) -> None:
    torch._check(x.dim() > 0, lambda: "x must have at least one dimension (..., in)")
    torch._check(x.is_floating_point(), lambda: f"x must be floating point, got {x.dtype}")


def residual(x: Tensor, residual: Tensor | None, out: tuple[int, ...]) -> None:
    """What is added to the result `out` of an op for x."""
    _check_like(x, residual=residual)
    _check_shape("residual", residual, *out)


def low_rank_linear(x, v, u, bias, activation, residual) -> list[tuple]:
    _check_input(x)
    _check_like(x, v=v, u=u, bias=bias, residual=residual)
    _check_factors(x, v, u, bias)
    out = (*x.shape[:-1], u.shape[0])
    _check_shape("residual", residual, *out)
    return [out, (*x.shape[:-1], v.shape[1])]


def gated_low_rank_linear(x, v, gate, u, bias) -> list[tuple]:
    _check_input(x)
    _check_like(x, v=v, gate=gate, u=u, bias=bias)
    _check_factors(x, v, u, bias)
    _check_shape("gate", gate, v.shape[1])
    return [(*x.shape[:-1], u.shape[0]), (*x.shape[:-1], v.shape[1])]


def low_rank_mlp(x, v1, u1, b1, v2, u2, b2, activation) -> list[tuple]:
    _check_input(x)
    _check_like(x, v1=v1, u1=u1, b1=b1, v2=v2, u2=u2, b2=b2)
    _check_factors(x, v1, u1, b1, "1")
    torch._check(v2.dim() == 2 and u2.dim() == 2, lambda: "v2, u2 must be matrices")
    _check_shape("v2", v2, u1.shape[0], v2.shape[1])
    _check_shape("u2", u2, u2.shape[0], v2.shape[1])
    _check_shape("b2", b2, u2.shape[0])
    return [(*x.shape[:-1], n) for n in (u2.shape[0], v1.shape[1], v2.shape[1])]


def dense_mlp(x, w1, b1, w2, b2, activation) -> list[tuple]:
    _check_input(x)
    _check_like(x, w1=w1, b1=b1, w2=w2, b2=b2)
    torch._check(w1.dim() == 2 and w2.dim() == 2, lambda: "w1, w2 must be matrices")
    _check_shape("w1", w1, w1.shape[0], x.shape[-1])
    _check_shape("b1", b1, w1.shape[0])
    _check_shape("w2", w2, w2.shape[0], w1.shape[0])
    _check_shape("b2", b2, w2.shape[0])
    return [(*x.shape[:-1], w2.shape[0])]


def low_rank_attention(x, wq, bq, wk, wv, wo, bo, heads, scale, mask) -> list[tuple]:
    _check_input(x)
    additive = mask if mask is not None and mask.dtype != torch.bool else None
    _check_like(x, wq=wq, bq=bq, wk=wk, wv=wv, wo=wo, bo=bo, attn_mask=additive)
    torch._check(x.dim() == 3, lambda: f"x must be (B, N, d), got {tuple(x.shape)}")
    _check_shape("wq", wq, wq.shape[0], x.shape[2])
    _check_shape("bq", bq, wq.shape[0])
    _check_shape("wk", wk, wq.shape[0], x.shape[2])
    _check_shape("wv", wv, wv.shape[0], x.shape[2])
    for name, rows in (("wq and wk", wq.shape[0]), ("wv", wv.shape[0])):
        torch._check(
            heads > 0 and rows % heads == 0,
            lambda n=name, r=rows: f"the {r} rows of {n} do not split into {heads} heads",
        )
    _check_shape("wo", wo, wo.shape[0], wv.shape[0])
    _check_shape("bo", bo, wo.shape[0])
    if mask is not None:
        torch._check(mask.dim() <= 4, lambda: "attn_mask must broadcast to (B, H, N, N)")
    widths = (wo.shape[0], wq.shape[0], wq.shape[0], wv.shape[0], wv.shape[0])
    return [(*x.shape[:2], n) for n in widths]
