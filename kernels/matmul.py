"""Plain products: projections of attention, wide ranks in two launches, and their gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels import tiles
from adacomcat.kernels.activations import activate, activation_grad
from adacomcat.kernels.blocks import (
    load_mn_major,
    load_row,
    load_tile,
    reads_rhs_from_shared,
    row_block,
    store_tile,
)
from adacomcat.kernels.launch import as_matrix, contiguous_rows, launch, stride


@triton.jit
def project_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, bias_ptr, residual_ptr, grad_ptr, y0_ptr, y1_ptr, y2_ptr,
    M, K, N0, N1, N2, stride_x, stride_w0, stride_w1, stride_w2, stride_residual, stride_grad,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """yᵢ = x Wᵢᵀ for up to three matrices in one grid; the bias belongs to the first.

    With a single matrix y = act(x Wᵀ + b) + residual, or with `grad_ptr` grad * act'(x Wᵀ + b).
    """
    tile = tl.program_id(1)
    tiles0, tiles1 = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
    w_ptr, y_ptr, N, stride_w, start_n = w0_ptr, y0_ptr, N0, stride_w0, tile
    if w1_ptr is not None:
        if tile >= tiles0:
            w_ptr, y_ptr, N, stride_w, start_n = w1_ptr, y1_ptr, N1, stride_w1, tile - tiles0
        if tile >= tiles0 + tiles1:
            w_ptr, y_ptr, N, stride_w = w2_ptr, y2_ptr, N2, stride_w2
            start_n = tile - tiles0 - tiles1
    first, remaining = row_block(M, BLOCK_M)
    rows, columns = tl.arange(0, BLOCK_M), start_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += first * stride_x
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride_x, rows, inner, remaining, K)
        w = load_tile(w_ptr, stride_w, columns, inner, N, K)
        y = tl.dot(x, tl.trans(w), y, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = load_row(bias_ptr, columns, N0)
        y += tl.where(tile < tiles0, bias, 0.0)[None, :]
    if grad_ptr is not None:
        grad = load_tile(grad_ptr + first * stride_grad, stride_grad, rows, columns, remaining, N)
        y = grad.to(tl.float32) * activation_grad(y, ACTIVATION, y_ptr.dtype.element_ty)
    else:
        y = activate(y, ACTIVATION, y_ptr.dtype.element_ty)
    if residual_ptr is not None:
        residual_ptr += first * stride_residual
        y += load_tile(residual_ptr, stride_residual, rows, columns, remaining, N).to(tl.float32)
    store_tile(y_ptr + first * N, N, rows, columns, remaining, N, y)


@triton.jit
def add_matmul(
    y, x_ptr, w_ptr, stride_x, stride_w, rows, columns, ROWS, K, N,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y + x W for one tile of y: x (ROWS, K), W (K, N)."""
    transpose: tl.constexpr = reads_rhs_from_shared(PRECISION, y.shape[0])
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride_x, rows, inner, ROWS, K)
        w = load_mn_major(w_ptr, stride_w, inner, columns, K, N, transpose)
        y = tl.dot(x, w, y, input_precision=PRECISION)
    return y


@triton.jit
def two_products(
    x_ptr, stride_x, w0_ptr, stride_w0, w1_ptr, stride_w1, columns, ROWS, N, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x W0ᵀ and x W1ᵀ for BLOCK_M rows in float32, with every tile of x loaded once.

    x is (ROWS, K), W0 and W1 (N, K); the results are (BLOCK_M, columns).
    """
    rows = tl.arange(0, BLOCK_M)
    y0 = tl.zeros((BLOCK_M, columns.shape[0]), tl.float32)
    y1 = tl.zeros((BLOCK_M, columns.shape[0]), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride_x, rows, inner, ROWS, K)
        w0 = load_tile(w0_ptr, stride_w0, columns, inner, N, K)
        y0 = tl.dot(x, tl.trans(w0), y0, input_precision=PRECISION)
        w1 = load_tile(w1_ptr, stride_w1, columns, inner, N, K)
        y1 = tl.dot(x, tl.trans(w1), y1, input_precision=PRECISION)
    return y0, y1


@triton.jit
def matmul_sum_kernel(
    x0_ptr, x1_ptr, x2_ptr, w0_ptr, w1_ptr, w2_ptr, y_ptr,
    M, N, K0, K1, K2, stride_x0, stride_x1, stride_x2, stride_w0, stride_w1, stride_w2,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = Σᵢ xᵢ Wᵢ for up to three products, accumulated in float32."""
    first, remaining = row_block(M, BLOCK_M)
    rows, columns = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y = add_matmul(
        y, x0_ptr + first * stride_x0, w0_ptr, stride_x0, stride_w0,
        rows, columns, remaining, K0, N, BLOCK_K, PRECISION,
    )  # fmt: skip
    if x1_ptr is not None:
        y = add_matmul(
            y, x1_ptr + first * stride_x1, w1_ptr, stride_x1, stride_w1,
            rows, columns, remaining, K1, N, BLOCK_K, PRECISION,
        )  # fmt: skip
    if x2_ptr is not None:
        y = add_matmul(
            y, x2_ptr + first * stride_x2, w2_ptr, stride_x2, stride_w2,
            rows, columns, remaining, K2, N, BLOCK_K, PRECISION,
        )  # fmt: skip
    store_tile(y_ptr + first * N, N, rows, columns, remaining, N, y)


def project(
    x: Tensor,
    bias: Tensor | None,
    *weights: Tensor,
    activation: str | None = None,
    residual: Tensor | None = None,
    grad: Tensor | None = None,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, ...]:
    """x Wᵢᵀ for one matrix or three in one launch; the bias belongs to the first.

    Args:
        x: (..., k).
        bias: (n₀,), or None.
        weights: one or three matrices (nᵢ, k); the results are (..., nᵢ).
        activation, residual: with one matrix the result is act(x Wᵀ + b) + residual.
        grad: with one matrix and `grad` (..., n) the result is grad * act'(x Wᵀ + b).
    """
    flat, weights = as_matrix(x), tuple(contiguous_rows(w) for w in weights)
    residual, grad = (None if t is None else as_matrix(t) for t in (residual, grad))
    m, k = flat.shape
    outs = tuple(x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights)
    widths = [w.shape[0] for w in weights] + [0] * (3 - len(weights))
    absent = [None] * (3 - len(weights))
    # With a tile of `grad` beside it, a tile of 128 columns spills in tf32x3.
    tile = tile or tiles.matmul_tile(m, sum(widths), x, widest=128 if grad is None else 64)
    columns = sum(triton.cdiv(n, tile.BLOCK_N) for n in widths)
    launch(
        project_kernel, (triton.cdiv(m, tile.BLOCK_M), columns), x,
        flat, *weights, *absent, None if bias is None else bias.contiguous(), residual, grad,
        *outs, *absent, m, k, *widths,
        flat.stride(0), *(w.stride(0) for w in weights), *(0 for _ in absent),
        stride(residual), stride(grad),
        ACTIVATION=activation, PRECISION=tiles.precision(x), **tile.arguments(),
    )  # fmt: skip
    return outs


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x W: x (..., k), W (k, n) → (..., n).

    torch.matmul is faster in 16-bit types. In exact float32 it does not use tensor cores.
    """
    return torch.matmul(x, w) if x.element_size() == 2 else matmul_sum((x, w))


def matmul_sum(*pairs: tuple[Tensor, Tensor], tile: tiles.Tile | None = None) -> Tensor:
    """Σᵢ xᵢ Wᵢ for one to three pairs in one launch: xᵢ (..., kᵢ), Wᵢ (kᵢ, n) → (..., n)."""
    lead = pairs[0][0].shape[:-1]
    xs, ws = [as_matrix(x) for x, _ in pairs], [contiguous_rows(w) for _, w in pairs]
    m, n = xs[0].shape[0], ws[0].shape[1]
    out = xs[0].new_empty(*lead, n)
    absent, zeros = [None] * (3 - len(pairs)), [0] * (3 - len(pairs))
    # The pointers of three products beside a tile of 128 columns spill on sm_89.
    tile = tile or tiles.matmul_tile(m, n, out, widest=64)
    launch(
        matmul_sum_kernel, (triton.cdiv(m, tile.BLOCK_M), triton.cdiv(n, tile.BLOCK_N)), out,
        *xs, *absent, *ws, *absent, out, m, n, *(w.shape[0] for w in ws), *zeros,
        *(x.stride(0) for x in xs), *zeros, *(w.stride(0) for w in ws), *zeros,
        PRECISION=tiles.precision(out), **tile.arguments(), **tiles.registers(tile),
    )  # fmt: skip
    return out
