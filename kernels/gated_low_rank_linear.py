"""gated_low_rank_linear: ((x V) * gate) Uᵀ + b, and its gradients.

It runs the kernels of low_rank_linear, with a gate between the two products.
With G = gradᵀ (x V) and D = grad U the gradients are
dx = (D * gate) Vᵀ,  dV = (xᵀ D) * gate,  dU = G * gate,  dgate = Σ_rows D * (x V).
"""

from collections.abc import Sequence

from torch import Tensor

from adacomcat.kernels import tiles
from adacomcat.kernels.launch import contiguous_rows
from adacomcat.kernels.low_rank_linear import gated
from adacomcat.kernels.matmul import matmul
from adacomcat.kernels.reductions import row_sum, weight_grad

Gradient = Tensor | None


def forward(
    x: Tensor,
    v: Tensor,
    gate: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    keep_intermediates: bool = True,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = ((x V) * gate) Uᵀ + b, and x V if `keep_intermediates`.

    Args:
        x: (..., in).
        v, gate, u, bias: (in, rank), (rank,), (out, rank), (out,).
    """
    return gated(x, v, gate, u, bias, keep_middle=keep_intermediates, tile=tile)


def backward(
    grad: Tensor,
    x: Tensor,
    v: Tensor,
    gate: Tensor,
    u: Tensor,
    bias: Tensor | None,
    middle: Tensor,
    needs: Sequence[bool],
    tile: tiles.Tile | None = None,
) -> tuple[Gradient, ...]:
    """The gradients of x, V, gate, U and b; None where `needs` is False.

    Args:
        grad: the gradient of y, (..., out).
        middle: x V from `forward`, (..., rank).
    """
    need_x, need_v, need_gate, need_u, need_bias = needs
    keep_middle = need_v or need_gate
    dx = dmiddle = None
    if need_x:
        dx, dmiddle = gated(grad, u, gate, v, keep_middle=keep_middle, tile=tile)
    elif keep_middle:
        dmiddle = matmul(grad, contiguous_rows(u))
    return (
        dx,
        weight_grad(x, dmiddle, gate) if need_v and dmiddle is not None else None,
        row_sum(dmiddle, middle) if need_gate and dmiddle is not None else None,
        weight_grad(grad, middle, gate) if need_u else None,
        row_sum(grad) if need_bias else None,
    )
