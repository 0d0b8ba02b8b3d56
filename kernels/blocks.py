"""Building blocks of all kernels: tile loads and stores, x V (`contract`) and · Uᵀ (`expand`).

A low-rank kernel contracts a block of rows to (BLOCK_M, BLOCK_R), keeps that in registers, and
expands it tile by tile. In every matrix the elements of a row are adjacent (column stride 1).
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_hip

from adacomcat.kernels.activations import activate


@triton.jit
def row_block(M, BLOCK_M: tl.constexpr):
    """The first row of this program's block, and how many of the M rows follow from there.

    The first row is an int64: offsets into a tensor may exceed 2^31, offsets into a block do not.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    return first, (M - first).to(tl.int32)


@triton.jit
def load_tile(
    ptr, stride, rows, columns, ROWS, COLUMNS,
    FULL: tl.constexpr = False,  # pyright: ignore[reportArgumentType]
):  # fmt: skip
    """ptr[rows, columns] of a (ROWS, COLUMNS) matrix, with zeros outside the matrix.

    FULL promises that the tile lies inside the matrix, and drops the mask.
    """
    ptrs = ptr + rows[:, None] * stride + columns[None, :]
    if FULL:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(rows[:, None] < ROWS) & (columns[None, :] < COLUMNS), other=0.0)


@triton.constexpr_function
def reads_rhs_from_shared(precision: Any, rows: Any) -> Any:
    """Whether a tf32 product of `rows` rows is a wgmma, which reads its rhs from shared memory.

    wgmma takes a tf32 rhs only with k contiguous. All other products read it from registers.
    """
    asynchronous = cuda_capability_geq(9, 0) and not cuda_capability_geq(12, 0)
    return precision == "tf32" and rows >= 64 and asynchronous


@triton.jit
def load_mn_major(
    ptr, stride, rows, columns, ROWS, COLUMNS, TRANSPOSE_TF32: tl.constexpr,
    FULL: tl.constexpr = False,  # pyright: ignore[reportArgumentType]
):  # fmt: skip
    """`load_tile` for an operand whose rows are the k dimension of the product ("MN-major").

    Tensor cores transpose only 16-bit elements, so Triton transposes such a tf32 tile itself.
    If the loaded tile is the direct operand of the product, Triton does so on the copy to shared
    memory, 32 bits at a time. If an elementwise operation lies in between, Triton copies 128 bits
    at a time and transposes afterwards. TRANSPOSE_TF32 therefore applies the mask a second time.
    It is for an lhs in tf32, and for a tf32 rhs where `reads_rhs_from_shared`.
    """
    tile = load_tile(ptr, stride, rows, columns, ROWS, COLUMNS, FULL)
    if TRANSPOSE_TF32:
        tile = tl.where((rows[:, None] < ROWS) & (columns[None, :] < COLUMNS), tile, 0.0)
    return tile


@triton.constexpr_function
def stores_groups_of_eight(element: tl.dtype) -> Any:
    """Whether `store_tile` stores a tile of this type as (rows, columns / 8, 8).

    AMD's matrix instruction leaves each thread four adjacent elements, a 64-bit store in 16-bit
    types. The three-dimensional shape makes Triton gather eight of them for a 128-bit store.
    """
    return is_hip() and element.primitive_bitwidth == 16


@triton.jit
def store_tile(ptr, stride, rows, columns, ROWS, COLUMNS, value):
    """ptr[rows, columns] = value inside the matrix, rounded to the matrix's type.

    `columns` is a contiguous range that starts at a multiple of eight.
    """
    value = value.to(ptr.dtype.element_ty)
    if stores_groups_of_eight(ptr.dtype.element_ty):
        EIGHTS: tl.constexpr = value.shape[1] // 8
        value = tl.reshape(value, (value.shape[0], EIGHTS, 8))
        columns = tl.reshape(columns, (EIGHTS, 8))
        # The reshape drops Triton's knowledge that columns are contiguous and aligned.
        columns = tl.multiple_of(tl.max_contiguous(columns, (1, 8)), (1, 8))[None, :, :]
        rows = rows[:, None, None]
    else:
        rows, columns = rows[:, None], columns[None, :]
    mask = (rows < ROWS) & (columns < COLUMNS)
    tl.store(ptr + rows * stride + columns, value, mask=mask)


@triton.jit
def load_row(ptr, columns, COLUMNS):
    """ptr[columns] of a vector in float32, with zeros past its end."""
    return tl.load(ptr + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)


@triton.jit
def row_moments(
    x_ptr, stride_x, ROWS, K, epsilon, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Mean and 1 / sqrt(variance + epsilon) of BLOCK_M rows of x (ROWS, K), (BLOCK_M, 1) each.

    Both sums are taken relative to the mean of the first BLOCK_K columns: E[x²] - E[x]² would
    cancel where the mean is large and the variance small.
    """
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    first = load_tile(x_ptr, stride_x, rows, columns, ROWS, K).to(tl.float32)
    center = (tl.sum(first, 1) / tl.minimum(K, BLOCK_K))[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=3):  # pyright: ignore[reportGeneralTypeIssues]
        inner = start + columns
        x = load_tile(x_ptr, stride_x, rows, inner, ROWS, K).to(tl.float32)
        x = tl.where(inner[None, :] < K, x - center, 0.0)
        total += x
        squares += x * x
    mean = (tl.sum(total, 1) / K)[:, None]
    variance = (tl.sum(squares, 1) / K)[:, None] - mean * mean
    return center + mean, tl.rsqrt(tl.maximum(variance, 0.0) + epsilon)


@triton.jit
def contract(
    x_ptr, stride_x, w_ptr, stride_w, epsilon, ROWS, K, R,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x W for BLOCK_M rows, (BLOCK_M, BLOCK_R) in float32: x (ROWS, K), W (K, R).

    With an epsilon the layer norm of x takes the place of x.
    """
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    if epsilon is not None:
        mean, scale = row_moments(x_ptr, stride_x, ROWS, K, epsilon, BLOCK_M, BLOCK_K)
    middle = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride_x, rows, inner, ROWS, K)
        if epsilon is not None:
            x = ((x.to(tl.float32) - mean) * scale).to(x.dtype)
        w = load_mn_major(
            w_ptr, stride_w, inner, ranks, K, R, reads_rhs_from_shared(PRECISION, BLOCK_M)
        )
        middle = tl.dot(x, w, middle, input_precision=PRECISION)
    return middle


@triton.jit
def expand(
    middle, w_ptr, stride_w, bias_ptr, residual_ptr, stride_residual, y_ptr, ROWS, N, R, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr = None,  # pyright: ignore[reportArgumentType]
):  # fmt: skip
    """Store y = act(middle Wᵀ + b) + residual in columns begin to end: W (N, R), y (ROWS, N)."""
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        w = load_tile(w_ptr, stride_w, columns, ranks, N, R)
        y = tl.dot(middle, tl.trans(w), input_precision=PRECISION)
        if bias_ptr is not None:
            y += load_row(bias_ptr, columns, N)[None, :]
        y = activate(y, ACTIVATION, y_ptr.dtype.element_ty)
        if residual_ptr is not None:
            y += load_tile(residual_ptr, stride_residual, rows, columns, ROWS, N).to(tl.float32)
        store_tile(y_ptr, N, rows, columns, ROWS, N, y)
