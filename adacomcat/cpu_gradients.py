"""The backward pass of the ops on the C++ kernels: formulas of ``gradients``, other products.

Each function takes the incoming gradient, the op's arguments without residual, what the op kept,
and which gradients are needed; of the hidden layer it recomputes what no one kept.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from adacomcat.gradients import Gradient, bias_grad
from adacomcat.reference import broadcast_mask, merge_heads, probability, split_heads

_OPS = torch.ops.adacomcat


def _weight_grad(needed: bool, a: Tensor, b: Tensor) -> Gradient:
    """aᵀ b over all rows."""
    return _OPS.weight_gradient_cpu(a, b) if needed else None


def _through_factors(grad: Tensor, v: Tensor, u: Tensor, need_x: bool,
                     need_v: bool) -> tuple[Gradient, Gradient]:
    """(grad U) Vᵀ and grad U: the gradients of x and of x V."""
    if need_x:
        return _OPS.low_rank_linear_cpu(grad, u, v, None, None, None, keep=True)
    return None, _OPS.row_product_cpu(grad, u) if need_v else None


def low_rank_linear(grad: Tensor, x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None,
                    activation: str | None, middle: Tensor,
                    needs: Sequence[bool]) -> tuple[Gradient, ...]:
    need_x, need_v, need_u, need_bias = needs
    if activation is not None:
        grad_pre = torch.empty(grad.shape, dtype=grad.dtype)
        _OPS.activation_gradient_cpu(middle, u, bias, grad, activation, grad_pre, None)
        grad = grad_pre
    grad_x, grad_middle = _through_factors(grad, v, u, need_x, need_v)
    return (grad_x, _weight_grad(need_v, x, grad_middle), _weight_grad(need_u, grad, middle),
            bias_grad(need_bias, grad))


def low_rank_mlp(grad: Tensor, x: Tensor, v1: Tensor, u1: Tensor, b1: Tensor | None, v2: Tensor,
                 u2: Tensor, b2: Tensor | None, activation: str | None, middle1: Tensor,
                 middle2: Tensor, needs: Sequence[bool]) -> tuple[Gradient, ...]:
    need_x, need_v1, need_u1, need_b1, need_v2, need_u2, need_b2 = needs
    grad_pre, grad_middle2 = _through_factors(grad, v2, u2, True, True)
    hidden = torch.empty_like(grad_pre) if need_v2 else None
    _OPS.activation_gradient_cpu(middle1, u1, b1, grad_pre, activation, grad_pre, hidden)
    grad_x, grad_middle1 = _through_factors(grad_pre, v1, u1, need_x, need_v1)
    return (grad_x, _weight_grad(need_v1, x, grad_middle1),
            _weight_grad(need_u1, grad_pre, middle1), bias_grad(need_b1, grad_pre),
            _weight_grad(need_v2, hidden, grad_middle2), _weight_grad(need_u2, grad, middle2),
            bias_grad(need_b2, grad))


def dense_mlp(grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor,
              b2: Tensor | None, activation: str | None,
              needs: Sequence[bool]) -> tuple[Gradient, ...]:
    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    grad_pre = _OPS.row_product_cpu(grad, w2)
    hidden = torch.empty_like(grad_pre) if need_w2 else None
    _OPS.activation_gradient_cpu(x, w1, b1, grad_pre, activation, grad_pre, hidden)
    return (_OPS.row_product_cpu(grad_pre, w1) if need_x else None,
            _weight_grad(need_w1, grad_pre, x), bias_grad(need_b1, grad_pre),
            _weight_grad(need_w2, grad, hidden), bias_grad(need_b2, grad))


def low_rank_attention(grad: Tensor, x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor,
                       wv: Tensor, wo: Tensor, bo: Tensor | None, num_heads: int, scale: float,
                       attn_mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, context: Tensor,
                       needs: Sequence[bool]) -> tuple[Gradient, ...]:
    need_x, need_wq, need_bq, need_wk, need_wv, need_wo, need_bo = needs
    split = partial(split_heads, num_heads=num_heads)
    q, k, v = split(q), split(k), split(v)
    p = probability(q, k, scale, broadcast_mask(attn_mask))
    d_heads = split(_OPS.row_product_cpu(grad, wo))
    ds = torch.ops.aten._softmax_backward_data(d_heads @ v.mT, p, -1, p.dtype)
    dq, dk = merge_heads(ds @ k) * scale, merge_heads(ds.mT @ q) * scale
    dv = merge_heads(p.mT @ d_heads)
    grad_x = None
    if need_x:
        for grad_projected, weight in ((dq, wq), (dk, wk), (dv, wv)):
            grad_x = _OPS.row_product_cpu(grad_projected, weight, grad_x)
    return (grad_x, _weight_grad(need_wq, dq, x), bias_grad(need_bq, dq),
            _weight_grad(need_wk, dk, x), _weight_grad(need_wv, dv, x),
            _weight_grad(need_wo, grad, context), bias_grad(need_bo, grad))
