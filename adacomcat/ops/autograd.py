"""The backward formula of every op, under the op's name: only the gradients that are asked for.

``registry`` calls them. ``ctx`` holds the tensor arguments and then the intermediates in
``saved_tensors``, the other arguments by name in ``options``. Intermediates carry no graph of their
own, so a backward pass that is itself differentiated computes them anew.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adacomcat.ops import shapes
from adacomcat.ops.reference import (
    QUICK,
    activate,
    broadcast_mask,
    merge_heads,
    probability,
    split_heads,
)

Gradient = Tensor | None


def by_kernel(
    launch: Callable[..., tuple[Gradient, ...]], ctx: Any, names: list[str], grad: Tensor
) -> tuple[Gradient, ...]:
    """The gradients that a backend's kernels compute, in the order of the arguments ``names``."""
    tensors = [name for name in names if name not in ctx.options]
    saved = ctx.saved_tensors  # once: gradient checkpointing computes them anew at every reading
    values = ctx.options | dict(zip(tensors, saved, strict=False))
    needed = dict(zip(names, ctx.needs_input_grad, strict=False))
    # The residual's gradient is the incoming one; a mask has none here.
    computed = [name for name in tensors if name not in ("residual", "attn_mask")]
    found = launch(
        grad,
        *(values[name] for name in names if name != "residual"),
        *saved[len(tensors) :],
        needs=[needed[name] for name in computed],
    )
    gradients = dict(zip(computed, found, strict=True))
    if needed.get("residual"):
        gradients["residual"] = grad
    return (*(gradients.get(name) for name in names), None)


def _reusable(ctx: Any) -> bool:
    return ctx.keep and not torch.is_grad_enabled()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])  # -1 is ambiguous where a width is 0


def _weight_grad(needed: bool, a: Gradient, b: Gradient) -> Gradient:
    """aᵀ b over all rows; a and b are None only where nothing needs them."""
    if not needed or a is None or b is None:
        return None
    return _rows(a).t() @ _rows(b)


def _bias_grad(needed: bool, grad: Gradient) -> Gradient:
    """The sum of all rows."""
    return _rows(grad).sum(0) if needed and grad is not None else None


def _activation_backward(grad: Tensor, pre: Tensor, activation: str | None) -> Tensor:
    """grad * act'(pre)."""
    if activation is None:
        return grad
    if activation == "relu":
        return grad * (pre > 0)
    if activation in ("silu", "quick_gelu"):
        # aten.silu_backward has no derivative of its own.
        inner = pre if activation == "silu" else QUICK * pre
        sigmoid = inner.sigmoid()
        return grad * sigmoid * (1 + inner * (1 - sigmoid))
    if activation not in ("gelu", "gelu_tanh"):
        raise ValueError(f"unknown activation '{activation}'")
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, pre, approximate=approximate)


def low_rank_linear(ctx: Any, grad: Tensor, *_: Gradient) -> tuple[Gradient, ...]:
    x, v, u, bias, residual, middle = ctx.saved_tensors
    need_x, need_v, need_u, need_bias, _, need_residual, _ = ctx.needs_input_grad
    grad_residual = grad if need_residual else None
    if not _reusable(ctx) and (need_u or ctx.options["activation"] is not None):
        middle = x @ v
    if ctx.options["activation"] is not None:
        pre = F.linear(middle, u, bias)
        grad = _activation_backward(grad, pre, ctx.options["activation"])
    grad_middle = grad @ u if need_x or need_v else None
    return (
        grad_middle @ v.t() if need_x else None,
        _weight_grad(need_v, x, grad_middle),
        _weight_grad(need_u, grad, middle),
        _bias_grad(need_bias, grad),
        None,
        grad_residual,
        None,
    )


def gated_low_rank_linear(ctx: Any, grad: Tensor, *_: Gradient) -> tuple[Gradient, ...]:
    x, v, gate, u, _, middle = ctx.saved_tensors
    need_x, need_v, need_gate, need_u, need_bias, _ = ctx.needs_input_grad
    if not _reusable(ctx) and (need_gate or need_u):
        middle = x @ v
    grad_gated = grad @ u if need_x or need_v or need_gate else None
    grad_middle = grad_gated * gate if need_x or need_v else None
    return (
        grad_middle @ v.t() if need_x else None,
        _weight_grad(need_v, x, grad_middle),
        _rows(grad_gated * middle).sum(0) if need_gate else None,
        _weight_grad(need_u, grad, middle * gate) if need_u else None,
        _bias_grad(need_bias, grad),
        None,
    )


def low_rank_mlp(ctx: Any, grad: Tensor, *_: Gradient) -> tuple[Gradient, ...]:
    x, v1, u1, b1, v2, u2, _, middle1, middle2 = ctx.saved_tensors
    need_x, need_v1, need_u1, need_b1, need_v2, need_u2, need_b2 = ctx.needs_input_grad[:7]
    reusable = _reusable(ctx)
    middle1 = middle1 if reusable else x @ v1
    pre = F.linear(middle1, u1, b1)
    hidden = activate(pre, ctx.options["activation"])
    middle2 = middle2 if reusable else hidden @ v2
    grad_middle2 = grad @ u2
    grad_pre = _activation_backward(grad_middle2 @ v2.t(), pre, ctx.options["activation"])
    grad_middle1 = grad_pre @ u1 if need_x or need_v1 else None
    return (
        grad_middle1 @ v1.t() if need_x else None,
        _weight_grad(need_v1, x, grad_middle1),
        _weight_grad(need_u1, grad_pre, middle1),
        _bias_grad(need_b1, grad_pre),
        _weight_grad(need_v2, hidden, grad_middle2),
        _weight_grad(need_u2, grad, middle2),
        _bias_grad(need_b2, grad),
        None,
        None,
    )


def dense_mlp(ctx: Any, grad: Tensor, *_: Gradient) -> tuple[Gradient, ...]:
    """The op keeps no intermediate: the hidden layer is computed anew."""
    x, w1, b1, w2, _ = ctx.saved_tensors
    need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:5]
    activation = ctx.options["activation"]
    grad_x = grad_w2 = grad_pre = None
    if need_x or need_w1 or need_b1 or need_w2:
        pre = F.linear(x, w1, b1)
        if need_w2:
            grad_w2 = _weight_grad(True, grad, activate(pre, activation))
        if need_x or need_w1 or need_b1:
            grad_pre = _activation_backward(grad @ w2, pre, activation)
            grad_x = grad_pre @ w1 if need_x else None
    return (
        grad_x,
        _weight_grad(need_w1, grad_pre, x),
        _bias_grad(need_b1, grad_pre),
        grad_w2,
        _bias_grad(need_b2, grad),
        None,
        None,
    )


def low_rank_attention(ctx: Any, grad: Tensor, *_: Gradient) -> tuple[Gradient, ...]:
    x, wq, bq, wk, wv, wo, _, mask, q, k, v, context = ctx.saved_tensors
    need_x, need_wq, need_bq, need_wk, need_wv, need_wo, need_bo = ctx.needs_input_grad[:7]
    if not _reusable(ctx):
        q, k, v = (F.linear(x, w, b) for w, b in ((wq, bq), (wk, None), (wv, None)))
    num_heads, scale = ctx.options["num_heads"], ctx.options["scale"]
    q, k, v = (split_heads(t, num_heads) for t in (q, k, v))
    p = probability(q, k, scale, broadcast_mask(mask))
    if not _reusable(ctx):
        context = merge_heads(p @ v)
    d_heads = split_heads(grad @ wo, num_heads)
    dp = d_heads @ v.transpose(-2, -1)
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
    dq = merge_heads(ds @ k) * scale
    dk = merge_heads(ds.transpose(-2, -1) @ q) * scale
    dv = merge_heads(p.transpose(-2, -1) @ d_heads)
    return (
        dq @ wq + dk @ wk + dv @ wv if need_x else None,
        _weight_grad(need_wq, dq, x),
        _bias_grad(need_bq, dq),
        _weight_grad(need_wk, dk, x),
        _weight_grad(need_wv, dv, x),
        _weight_grad(need_wo, grad, context),
        _bias_grad(need_bo, grad),
        None,
        None,
        ds.sum_to_size(mask.shape) if ctx.needs_input_grad[9] else None,
        None,
    )


def _svd_gradient(u: Tensor, s: Tensor, v: Tensor, k: int, grad_u: Gradient, grad_s: Gradient,
                  grad_v: Gradient) -> tuple[Tensor, Tensor]:
    """(left, right) with left rightᵀ the gradient of the matrix whose whole SVD is u, s, v.

    Gradients of the first k triples (Townsend, "Differentiating the singular value decomposition"):
    U (S̃ + (F∘P̃) S + S (F∘Q̃)) Vᵀ, P̃ = P - Pᵀ for P = Uᵀ grad_u, Q̃ of V, F_ij = 1 / (s_j² - s_i²),
    and the parts outside of the two spaces: (I - U Uᵀ) grad_u S⁻¹ Vᵀ, U S⁻¹ ((I - V Vᵀ) grad_v)ᵀ.
    """
    size = s.shape[-1]
    core = s.new_zeros(*s.shape, size)
    if grad_s is not None:
        core = core + torch.diag_embed(F.pad(grad_s, (0, size - k)))
    if grad_u is None and grad_v is None:
        return u @ core, v
    outside = u.shape[-2] > size, v.shape[-2] > size
    s = torch.ops.adacomcat.require_distinct(s, k, any(outside))
    row, column = s.unsqueeze(-1), s.unsqueeze(-2)
    index = torch.arange(size, device=s.device)
    # Two triples that are both cut off, and one triple with itself, add nothing.
    idle = ((index[:, None] >= k) & (index >= k)) | (index[:, None] == index)
    weights = ((column - row) * (column + row)).masked_fill(idle, 1).reciprocal()
    weights = weights.masked_fill(idle, 0)
    lefts, rights = [], []
    for basis, grad, is_left in ((u, grad_u, True), (v, grad_v, False)):
        if grad is None:
            continue
        inner = F.pad(basis.mT @ grad, (0, size - k))
        turned = weights * (inner - inner.mT)
        core = core + (turned * column if is_left else row * turned)
        if outside[0 if is_left else 1]:
            rest = grad - basis @ (basis.mT @ grad)
            other = (v if is_left else u)[..., :k] / column[..., :k]
            lefts.append(rest if is_left else other)
            rights.append(other if is_left else rest)
    return torch.cat([u @ core, *lefts], -1), torch.cat([v, *rights], -1)


def batched_svd(ctx: Any, grad_u: Gradient, grad_s: Gradient,
                grad_v: Gradient) -> tuple[Gradient, ...]:
    (a,) = ctx.saved_tensors
    u, s, v = torch.ops.adacomcat.batched_svd(a, min(a.shape[-2:]))
    left, right = _svd_gradient(u, s, v, ctx.options["k"], grad_u, grad_s, grad_v)
    return left @ right.mT, None


def low_rank_approximation(ctx: Any, grad_u: Gradient, grad_s: Gradient,
                           grad_v: Gradient) -> tuple[Gradient, ...]:
    (a,) = ctx.saved_tensors
    u, s, v = torch.ops.adacomcat.low_rank_approximation(a, min(a.shape[-2:]))
    left, right = _svd_gradient(u, s, v, ctx.options["k"], grad_u, grad_s, grad_v)
    return left @ right.mT, None


def factored_svd(ctx: Any, grad_u: Gradient, grad_s: Gradient,
                 grad_v: Gradient) -> tuple[Gradient, ...]:
    """a bᵀ has the gradient left rightᵀ: left (rightᵀ b) for a, right (leftᵀ a) for b."""
    a, b = ctx.saved_tensors
    u, s, v = torch.ops.adacomcat.factored_svd(a, b, shapes.rank_limit(a, b))
    left, right = _svd_gradient(u, s, v, ctx.options["k"], grad_u, grad_s, grad_v)
    return left @ (right.mT @ b), right @ (left.mT @ a), None


def truncation_errors(ctx: Any, grad: Tensor) -> Tensor:
    """Rank r counts the values i ≥ r, so value i collects the ranks r ≤ i."""
    (s,) = ctx.saved_tensors
    return 2 * s * grad[..., :-1].cumsum(-1).unsqueeze(-2)


def require_distinct(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None
