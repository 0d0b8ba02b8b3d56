"""low_rank_linear: act((x V) Uᵀ + b) + residual, and its gradients.

One program owns BLOCK_M rows: it reads them once, keeps x V on the chip, and writes all N outputs,
so neither x is read nor x V computed again for each output tile. Few rows would leave most of a GPU
idle: there several programs own the same rows, each of which computes x V and writes its part of
the columns, or where V is large x V is a product of its own. Without an activation the gradient of
x is the same computation, with the factors exchanged: (grad U) Vᵀ.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels import tiles
from adacomcat.kernels.activations import slope
from adacomcat.kernels.blocks import contract, expand, load_row, load_tile, store_tile
from adacomcat.kernels.launching import adjacent, launch, rows, stride
from adacomcat.kernels.products import product, project
from adacomcat.kernels.reductions import row_sum, weight_grad, weight_grads

Gradient = Tensor | None


@triton.jit
def low_rank_linear_kernel(
    x_ptr, v_ptr, gate_ptr, u_ptr, bias_ptr, residual_ptr, y_ptr, middle_ptr,
    M, K, N, R, stride_x, stride_v, stride_u, stride_residual, columns_per_part,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = act(((x V) * gate) Uᵀ + b) + residual; x V too where `middle_ptr` is given."""
    # 64 bits: a tensor may have more than 2^31 elements, a tile has not.
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    left = (M - first).to(tl.int32)
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    middle = contract(
        x_ptr + first * stride_x, stride_x, v_ptr, stride_v, None, left, K, R,
        BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
    )  # fmt: skip
    if middle_ptr is not None:
        kept = tl.where(tl.program_id(1) == 0, left, 0)  # one of those that share the rows writes
        store_tile(middle_ptr + first * R, R, rows, ranks, kept, R, middle)
    if gate_ptr is not None:
        middle *= load_row(gate_ptr, ranks, R)[None, :]
    if residual_ptr is not None:
        residual_ptr += first * stride_residual
    begin = tl.program_id(1) * columns_per_part
    expand(
        middle.to(x_ptr.dtype.element_ty), u_ptr, stride_u, bias_ptr,
        residual_ptr, stride_residual, y_ptr + first * N,
        left, N, R, begin, begin + columns_per_part,
        ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip


@triton.jit
def low_rank_linear_backward_kernel(
    grad_ptr, middle_ptr, u_ptr, bias_ptr, v_ptr, dx_ptr, dmiddle_ptr,
    M, K, N, R, stride_grad, stride_middle, stride_u, stride_v,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dmiddle = (grad * act'(middle Uᵀ + b)) U and dx = dmiddle Vᵀ; the derivative stays here."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    left = (M - first).to(tl.int32)
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    middle = load_tile(
        middle_ptr + first * stride_middle, stride_middle, rows, ranks, left, R
    )
    grad_ptr += first * stride_grad
    dmiddle = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        u = load_tile(u_ptr, stride_u, columns, ranks, N, R)
        pre = tl.dot(middle, tl.trans(u), input_precision=PRECISION)
        if bias_ptr is not None:
            pre += load_row(bias_ptr, columns, N)[None, :]
        grad = load_tile(grad_ptr, stride_grad, rows, columns, left, N).to(tl.float32)
        grad = (grad * slope(pre, ACTIVATION, u.dtype)).to(u.dtype)
        dmiddle = tl.dot(grad, u, dmiddle, input_precision=PRECISION)
    if dmiddle_ptr is not None:
        store_tile(dmiddle_ptr + first * R, R, rows, ranks, left, R, dmiddle)
    if dx_ptr is not None:
        expand(
            dmiddle.to(v_ptr.dtype.element_ty), v_ptr, stride_v, None, None, 0,
            dx_ptr + first * K, left, K, R, 0, K, None, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip


def forward(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    keep_intermediates: bool = True,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """act((x V) Uᵀ + b) + residual, and x V if `keep_intermediates`."""
    return gated(x, v, None, u, bias, activation, residual, True, keep_intermediates, tile)


def gated(
    x: Tensor,
    v: Tensor,
    gate: Tensor | None,
    u: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    need_out: bool = True,
    need_middle: bool = True,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """act(((x V) * gate) Uᵀ + b) + residual, and x V: each only if needed."""
    flat, v, u = rows(x), adjacent(v), adjacent(u)
    (m, k), (n, r) = flat.shape, u.shape
    if not need_out or tiles.takes_two_launches(m, k, r, x):
        middle = product(x, v)
        if not need_out:
            return None, middle
        u = u if gate is None else u * gate
        return *project(middle, bias, u, activation=activation, residual=residual), middle
    bias = None if bias is None else bias.contiguous()
    gate = None if gate is None else gate.contiguous()
    residual = None if residual is None else rows(residual)
    out = x.new_empty(*x.shape[:-1], n)
    middle = x.new_empty(*x.shape[:-1], r) if need_middle else None

    def run(tile: tiles.Tile) -> None:
        blocks = triton.cdiv(m, tile.BLOCK_M)
        columns = tiles.columns_per_part(n, tile.BLOCK_N, blocks)
        launch(
            low_rank_linear_kernel, (blocks, max(1, triton.cdiv(n, columns))), x,
            flat, v, gate, u, bias, residual, out, middle, m, k, n, r,
            flat.stride(0), v.stride(0), u.stride(0), stride(residual), columns,
            ACTIVATION=activation, BLOCK_R=tiles.padded(r), PRECISION=tiles.precision(x),
            **tile.arguments(),
        )  # fmt: skip

    table = tile or tiles.linear_tile(m, r, x)
    run(tiles.best(table, ("low_rank_linear", m, k, n, r), x, run))
    return out, middle


def backward(
    grad: Tensor,
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    activation: str | None,
    middle: Tensor,
    needs: Sequence[bool],
    tile: tiles.Tile | None = None,
) -> tuple[Gradient, ...]:
    """The gradients of x, V, U and b; None for those that are not needed."""
    need_x, need_v, need_u, need_bias = needs
    if activation is None:
        dx, dmiddle = None, None
        if need_x or need_v:
            dx, dmiddle = gated(grad, u, None, v, None, None, None, need_x, need_v, tile)
        du = weight_grad(grad, middle) if need_u else None
        dbias = row_sum(grad) if need_bias else None
    elif tiles.takes_two_launches(rows(grad).shape[0], u.shape[0], u.shape[1], grad):
        (inner,) = project(middle, bias, u, activation=activation, grad=grad)
        return backward(inner, x, v, u, None, None, middle, needs, tile)
    else:
        dx, dmiddle = _through_activation(
            grad, middle, u, bias, v, activation, need_x, need_v, tile
        )
        du, dbias = weight_grads(grad, middle, u, bias, activation, (need_u, need_bias))
    return dx, weight_grad(x, dmiddle) if need_v else None, du, dbias


def _through_activation(
    grad: Tensor,
    middle: Tensor,
    u: Tensor,
    bias: Tensor | None,
    v: Tensor,
    activation: str,
    need_x: bool,
    need_v: bool,
    tile: tiles.Tile | None,
) -> tuple[Gradient, Gradient]:
    """The gradients of x and of x V."""
    dx = grad.new_empty(*grad.shape[:-1], v.shape[0]) if need_x else None
    dmiddle = torch.empty_like(middle, memory_format=torch.contiguous_format) if need_v else None
    if not (need_x or need_v):
        return None, None
    flat, kept, v, u = rows(grad), rows(middle), adjacent(v), adjacent(u)
    bias = None if bias is None else bias.contiguous()
    (m, n), (k, r) = flat.shape, v.shape
    # Programs share no columns here.
    tile = tile or tiles.row_tile(m, r, grad, least=16)
    launch(
        low_rank_linear_backward_kernel, (triton.cdiv(m, tile.BLOCK_M),), grad,
        flat, kept, u, bias, v, dx, dmiddle, m, k, n, r,
        flat.stride(0), kept.stride(0), u.stride(0), v.stride(0),
        ACTIVATION=activation, BLOCK_R=tiles.padded(r), PRECISION=tiles.precision(grad),
        **tile.arguments(without="BLOCK_K"),
    )  # fmt: skip
    return dx, dmiddle
