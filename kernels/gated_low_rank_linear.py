"""gated_low_rank_linear: ((x V) * gate) Uᵀ + b, and its gradients.

The kernels of low_rank_linear with a gate between the two products. With G = gradᵀ (x V) and
D = grad U:  dx = (D * gate) Vᵀ,  dV = (xᵀ D) * gate,  dU = G * gate,  dgate = Σ_rows D * (x V).
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from adacomcat.kernels import tiles
from adacomcat.kernels.blocks import load_tile
from adacomcat.kernels.launching import launch, rows
from adacomcat.kernels.low_rank_linear import gated
from adacomcat.kernels.reductions import part_rows, parts_of, sum_parts, weight_grad
from torch import Tensor

Gradient = Tensor | None


@triton.jit
def gate_grad_kernel(
    a_ptr, b_ptr, out_ptr, M, R, stride_a, stride_b, rows_per_part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One part of Σ_rows a * b: a, b (M, R) → (R,)."""
    part = tl.program_id(1)
    first = part.to(tl.int64) * rows_per_part
    left = tl.minimum(M - first, rows_per_part).to(tl.int32)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, left, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        a = load_tile(a_ptr + first * stride_a, stride_a, rows, columns, left, R)
        b = load_tile(b_ptr + first * stride_b, stride_b, rows, columns, left, R)
        total += tl.sum(a.to(tl.float32) * b.to(tl.float32), 0)
    value = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + part * R + columns, value, mask=columns < R)


def forward(
    x: Tensor,
    v: Tensor,
    gate: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    keep: bool = True,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """((x V) * gate) Uᵀ + b, and x V if `keep`."""
    return gated(x, v, gate, u, bias, need_middle=keep, tile=tile)


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
    dv, _ = weight_grad(x, dgated, gate, (need_v, False))
    du, dbias = weight_grad(grad, middle, gate, (need_u, need_bias))
    return dx, dv, _gate_grad(dgated, middle) if need_gate else None, du, dbias


def _gate_grad(dgated: Tensor, middle: Tensor) -> Tensor:
    """Σ_rows dgated * middle."""
    a, b = rows(dgated), rows(middle)
    m, r = a.shape
    tile = tiles.Tile(BLOCK_M=64, BLOCK_K=64, BLOCK_N=64, num_warps=4, num_stages=2)
    columns = triton.cdiv(r, tile.BLOCK_N)
    parts = tiles.splits(m, tile.BLOCK_M, columns)
    total = parts_of(a, parts, r)
    launch(
        gate_grad_kernel, (columns, parts), a,
        a, b, total, m, r, a.stride(0), b.stride(0), part_rows(m, parts, tile.BLOCK_M),
        **tile.arguments(without="BLOCK_K"),
    )  # fmt: skip
    return sum_parts(total, a.dtype)
