"""low_rank_linear: act((x V) Uᵀ + b) + residual, and its gradients.

One program owns BLOCK_M rows. It reads them once, keeps x V in registers, and writes all N outputs.
Few rows would leave most of the GPU idle, so there several programs share the same rows: each
computes x V and writes some of the columns. If V is large, x V becomes a launch of its own instead.
Without an activation the gradient of x is the same computation with U and V exchanged: (grad U) Vᵀ.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels import tiles
from adacomcat.kernels.activations import activation_grad
from adacomcat.kernels.blocks import (
    contract,
    expand,
    load_row,
    load_tile,
    row_block,
    store_tile,
)
from adacomcat.kernels.launch import as_matrix, contiguous_rows, launch, stride
from adacomcat.kernels.matmul import matmul, project
from adacomcat.kernels.reductions import row_sum, weight_and_bias_grads, weight_grad

Gradient = Tensor | None


@triton.jit
def low_rank_linear_kernel(
    x_ptr, v_ptr, gate_ptr, u_ptr, bias_ptr, residual_ptr, y_ptr, middle_ptr,
    M, K, N, R, stride_x, stride_v, stride_u, stride_residual, columns_per_program,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = act(((x V) * gate) Uᵀ + b) + residual; with `middle_ptr` also x V."""
    first, remaining = row_block(M, BLOCK_M)
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    middle = contract(
        x_ptr + first * stride_x, stride_x, v_ptr, stride_v, None, remaining, K, R,
        BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
    )  # fmt: skip
    if middle_ptr is not None:
        # The first of the programs that share these rows stores them.
        stored = tl.where(tl.program_id(1) == 0, remaining, 0)
        store_tile(middle_ptr + first * R, R, rows, ranks, stored, R, middle)
    if gate_ptr is not None:
        middle *= load_row(gate_ptr, ranks, R)[None, :]
    if residual_ptr is not None:
        residual_ptr += first * stride_residual
    begin = tl.program_id(1) * columns_per_program
    expand(
        middle.to(x_ptr.dtype.element_ty), u_ptr, stride_u, bias_ptr,
        residual_ptr, stride_residual, y_ptr + first * N,
        remaining, N, R, begin, begin + columns_per_program,
        BLOCK_M, BLOCK_N, BLOCK_R, PRECISION, ACTIVATION,
    )  # fmt: skip


@triton.jit
def low_rank_linear_backward_kernel(
    grad_ptr, middle_ptr, u_ptr, bias_ptr, v_ptr, dx_ptr, dmiddle_ptr,
    M, K, N, R, stride_grad, stride_middle, stride_u, stride_v,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dmiddle = (grad * act'(middle Uᵀ + b)) U and dx = dmiddle Vᵀ; middle = x V is an input."""
    first, remaining = row_block(M, BLOCK_M)
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    middle = load_tile(
        middle_ptr + first * stride_middle, stride_middle, rows, ranks, remaining, R
    )
    grad_ptr += first * stride_grad
    dmiddle = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        u = load_tile(u_ptr, stride_u, columns, ranks, N, R)
        pre = tl.dot(middle, tl.trans(u), input_precision=PRECISION)
        if bias_ptr is not None:
            pre += load_row(bias_ptr, columns, N)[None, :]
        grad = load_tile(grad_ptr, stride_grad, rows, columns, remaining, N).to(tl.float32)
        grad = (grad * activation_grad(pre, ACTIVATION, u.dtype)).to(u.dtype)
        dmiddle = tl.dot(grad, u, dmiddle, input_precision=PRECISION)
    if dmiddle_ptr is not None:
        store_tile(dmiddle_ptr + first * R, R, rows, ranks, remaining, R, dmiddle)
    if dx_ptr is not None:
        expand(
            dmiddle.to(v_ptr.dtype.element_ty), v_ptr, stride_v, None, None, 0,
            dx_ptr + first * K, remaining, K, R, 0, K, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
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
    """y = act((x V) Uᵀ + b) + residual, and x V if `keep_intermediates`.

    Args:
        x, residual: (..., in) and (..., out).
        v, u, bias: (in, rank), (out, rank), (out,).
    """
    return gated(x, v, None, u, bias, activation, residual, keep_intermediates, tile)


def gated(
    x: Tensor,
    v: Tensor,
    gate: Tensor | None,
    u: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    keep_middle: bool = True,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """act(((x V) * gate) Uᵀ + b) + residual, and x V if `keep_middle`; shapes as in `forward`."""
    flat, v, u = as_matrix(x), contiguous_rows(v), contiguous_rows(u)
    (m, k), (n, r) = flat.shape, u.shape
    if tiles.takes_two_launches(m, k, r, x):
        middle = matmul(x, v)
        u = u if gate is None else u * gate
        (out,) = project(middle, bias, u, activation=activation, residual=residual)
        return out, middle
    bias = None if bias is None else bias.contiguous()
    gate = None if gate is None else gate.contiguous()
    residual = None if residual is None else as_matrix(residual)
    out = x.new_empty(*x.shape[:-1], n)
    middle = x.new_empty(*x.shape[:-1], r) if keep_middle else None

    def run(tile: tiles.Tile) -> None:
        blocks = triton.cdiv(m, tile.BLOCK_M)
        columns = tiles.columns_per_program(n, tile.BLOCK_N, blocks)
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
    """The gradients of x, V, U and b; None where `needs` is False.

    Args:
        grad: the gradient of y, (..., out).
        middle: x V from `forward`, (..., rank).
    """
    need_x, need_v, need_u, need_bias = needs
    if activation is None:
        dx = dmiddle = None
        if need_x:
            dx, dmiddle = gated(grad, u, None, v, keep_middle=need_v, tile=tile)
        elif need_v:
            dmiddle = matmul(grad, contiguous_rows(u))
        du = weight_grad(grad, middle) if need_u else None
        dbias = row_sum(grad) if need_bias else None
    elif tiles.takes_two_launches(as_matrix(grad).shape[0], u.shape[0], u.shape[1], grad):
        (inner,) = project(middle, bias, u, activation=activation, grad=grad)
        return backward(inner, x, v, u, None, None, middle, needs, tile)
    else:
        dx, dmiddle = _through_activation(
            grad, middle, u, bias, v, activation, need_x, need_v, tile
        )
        du, dbias = weight_and_bias_grads(
            grad, middle, u, bias, activation, (need_u, need_bias)
        )
    dv = weight_grad(x, dmiddle) if need_v and dmiddle is not None else None
    return dx, dv, du, dbias


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
    """The gradients of x and of x V, in one launch."""
    dx = grad.new_empty(*grad.shape[:-1], v.shape[0]) if need_x else None
    dmiddle = torch.empty_like(middle, memory_format=torch.contiguous_format) if need_v else None
    if not (need_x or need_v):
        return None, None
    flat, flat_middle = as_matrix(grad), as_matrix(middle)
    v, u = contiguous_rows(v), contiguous_rows(u)
    bias = None if bias is None else bias.contiguous()
    (m, n), (k, r) = flat.shape, v.shape
    # Every program takes all columns of its rows, hence a small `least`.
    tile = tile or tiles.row_tile(m, r, grad, least=16)
    launch(
        low_rank_linear_backward_kernel, (triton.cdiv(m, tile.BLOCK_M),), grad,
        flat, flat_middle, u, bias, v, dx, dmiddle, m, k, n, r,
        flat.stride(0), flat_middle.stride(0), u.stride(0), v.stride(0),
        ACTIVATION=activation, BLOCK_R=tiles.padded(r), PRECISION=tiles.precision(grad),
        **tile.arguments(without="BLOCK_K"),
    )  # fmt: skip
    return dx, dmiddle
