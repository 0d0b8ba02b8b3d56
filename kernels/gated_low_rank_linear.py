"""gated_low_rank_linear: ((x V) * gate) Uᵀ + b, and its gradients.

The kernels of low_rank_linear with a gate between the two products. With G = gradᵀ (x V) and
D = grad U:  dx = (D * gate) Vᵀ,  dV = (xᵀ D) * gate,  dU = G * gate,  dgate = Σ_rows D * (x V).
"""

from collections.abc import Sequence

from torch import Tensor

from adacomcat.kernels import tiles
from adacomcat.kernels.low_rank_linear import gated
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
    """((x V) * gate) Uᵀ + b, and x V if `keep_intermediates`."""
    return gated(x, v, gate, u, bias, need_middle=keep_intermediates, tile=tile)


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
    """The gradients of x, V, gate, U and b; None for those that are not needed."""
    need_x, need_v, need_gate, need_u, need_bias = needs
    need_middle = need_v or need_gate
    dx, dgated = None, None
    if need_x or need_middle:
        dx, dgated = gated(
            grad, u, gate, v, need_out=need_x, need_middle=need_middle, tile=tile
        )
    return (
        dx,
        weight_grad(x, dgated, gate) if need_v else None,
        row_sum(dgated, middle) if need_gate else None,
        weight_grad(grad, middle, gate) if need_u else None,
        row_sum(grad) if need_bias else None,
    )
