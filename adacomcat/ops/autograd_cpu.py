"""The backward pass of the ops on C++ kernels: the formulas of ``autograd``, on fused products.

``registry`` calls these functions through ``backends.backward_kernel``. Each takes the incoming
gradient, the op's arguments without a residual, the op's intermediates, and which gradients are
needed. Kernels recompute the hidden layer of an MLP, which the forward pass does not keep.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from adacomcat.ops.reference import broadcast_mask, merge_heads, probability, split_heads

Gradient = Tensor | None
# Attention probabilities that are computed at a time, so that they stay in cache in any batch.
LOGITS = 1 << 20
_OPS = torch.ops.adacomcat


def _weight_and_bias(need_weight: bool, need_bias: bool, grad: Tensor,
                     x: Tensor) -> tuple[Gradient, Gradient]:
    """gradᵀ x and the sum of grad, over all rows."""
    if not (need_weight or need_bias):
        return None, None
    weight, bias = _OPS.weight_gradient_cpu(grad, x)
    return weight if need_weight else None, bias if need_bias else None


def _weight(needed: bool, grad: Tensor, x: Tensor) -> Gradient:
    return _weight_and_bias(needed, False, grad, x)[0]


def low_rank_linear(grad: Tensor, x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None,
                    activation: str | None, middle: Tensor,
                    needs: Sequence[bool]) -> tuple[Gradient, ...]:
    need_x, need_v, need_u, need_bias = needs
    if activation is None:
        grad_x, grad_middle = _OPS.low_rank_linear_cpu(grad, u, v, None, None, None,
                                                        keep_intermediates=True)
    else:
        grad, _, _, grad_middle, grad_x = _OPS.hidden_gradient_cpu(
            grad, middle, u, bias, activation, None, None, v, False)
    return (grad_x if need_x else None, _weight(need_v, x, grad_middle),
            *_weight_and_bias(need_u, need_bias, grad, middle))


def low_rank_mlp(grad: Tensor, x: Tensor, v1: Tensor, u1: Tensor, b1: Tensor | None, v2: Tensor,
                 u2: Tensor, b2: Tensor | None, activation: str | None, middle1: Tensor,
                 middle2: Tensor, needs: Sequence[bool]) -> tuple[Gradient, ...]:
    need_x, need_v1, need_u1, need_b1, need_v2, need_u2, need_b2 = needs
    grad_pre, hidden, grad_middle2, grad_middle1, grad_x = _OPS.hidden_gradient_cpu(
        grad, middle1, u1, b1, activation, u2, v2, v1, need_v2)
    return (grad_x if need_x else None, _weight(need_v1, x, grad_middle1),
            *_weight_and_bias(need_u1, need_b1, grad_pre, middle1),
            _weight(need_v2, hidden, grad_middle2),
            *_weight_and_bias(need_u2, need_b2, grad, middle2))


def dense_mlp(grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor,
              b2: Tensor | None, activation: str | None,
              needs: Sequence[bool]) -> tuple[Gradient, ...]:
    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    grad_pre, hidden, _, grad_x, _ = _OPS.hidden_gradient_cpu(
        grad, x, w1, b1, activation, None, w2.t(), None, need_w2)
    return (grad_x if need_x else None, *_weight_and_bias(need_w1, need_b1, grad_pre, x),
            *_weight_and_bias(need_w2, need_b2, grad, hidden if need_w2 else grad[..., :0]))


def low_rank_attention(grad: Tensor, x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor,
                       wv: Tensor, wo: Tensor, bo: Tensor | None, num_heads: int, scale: float,
                       attn_mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, context: Tensor,
                       needs: Sequence[bool]) -> tuple[Gradient, ...]:
    need_x, need_wq, need_bq, need_wk, need_wv, need_wo, need_bo = needs
    mask, grad_context = broadcast_mask(attn_mask), _OPS.row_product_cpu(grad, wo)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    images = max(LOGITS // max(num_heads * x.shape[1] ** 2, 1), 1)
    for first in range(0, x.shape[0], images):
        part = slice(first, first + images)
        some = mask if mask is None or mask.shape[0] == 1 else mask[part]
        queries, keys, values, d_heads = (split_heads(t[part], num_heads)
                                          for t in (q, k, v, grad_context))
        p = probability(queries, keys, scale, some)
        ds = torch.ops.aten._softmax_backward_data(d_heads @ values.mT, p, -1, p.dtype)
        dq[part] = merge_heads(ds @ keys) * scale
        dk[part] = merge_heads(ds.mT @ queries) * scale
        dv[part] = merge_heads(p.mT @ d_heads)
    grad_x = None
    if need_x:
        for grad_projected, weight in ((dq, wq), (dk, wk), (dv, wv)):
            grad_x = _OPS.row_product_cpu(grad_projected, weight, grad_x)
    return (grad_x, *_weight_and_bias(need_wq, need_bq, dq, x), _weight(need_wk, dk, x),
            _weight(need_wv, dv, x), *_weight_and_bias(need_wo, need_bo, grad, context))
