"""The two halves of every low-rank kernel: rows into the rank, and out of it again.

A block of rows is contracted to (BLOCK_M, BLOCK_R), which stays on the chip, and expanded from
there; weights are read tile by tile. Matrices have adjacent elements in each row.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_hip

from adacomcat.kernels.activations import activate


@triton.jit
def load_tile(ptr, stride, rows, columns, ROWS, COLUMNS, WHOLE: tl.constexpr = False):
    """ptr[rows, columns] of a (ROWS, COLUMNS) matrix, zero outside; of a WHOLE tile nothing is."""
    ptrs = ptr + rows[:, None] * stride + columns[None, :]
    if WHOLE:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(rows[:, None] < ROWS) & (columns[None, :] < COLUMNS), other=0.0)


@triton.constexpr_function
def is_shared(precision: str, rows: int) -> bool:
    """Whether tensor cores read the right operand of a tf32 product of that many rows themselves.

    From shared memory, where it has to lie transposed; others get it from the registers.
    """
    asynchronous = cuda_capability_geq(9, 0) and not cuda_capability_geq(12, 0)
    return precision == "tf32" and rows >= 64 and asynchronous


@triton.jit
def load_transposed(
    ptr, stride, rows, columns, ROWS, COLUMNS, IS_TF32: tl.constexpr, WHOLE: tl.constexpr = False
):  # fmt: skip
    """load_tile for an operand over whose rows a product sums.

    Tensor cores transpose 16-bit elements only. A tile that goes straight from memory into a
    product with tf32, triton transposes on the way to shared memory, 32 bits at a time: a left one
    always, a right one where `is_shared`. One that is computed with in between is copied as it
    lies, 128 bits at a time and no later, and transposed from there: so zeros are filled in twice.
    """
    tile = load_tile(ptr, stride, rows, columns, ROWS, COLUMNS, WHOLE)
    if IS_TF32:
        tile = tl.where((rows[:, None] < ROWS) & (columns[None, :] < COLUMNS), tile, 0.0)
    return tile


@triton.constexpr_function
def is_stored_by_eights(element: tl.dtype) -> bool:
    """Whether a tile of that type is stored as (rows, columns / 8, 8).

    On AMD the matrix instruction leaves a thread four elements of a row, from where triton would
    store them, 64 bits of 16-bit types. In this shape it brings eight together first.
    """
    return is_hip() and element.primitive_bitwidth == 16


@triton.jit
def store_tile(ptr, stride, rows, columns, ROWS, COLUMNS, value):
    """ptr[rows, columns] = value, rounded to the matrix's type, nothing outside.

    Columns are adjacent, from a multiple of eight.
    """
    value = value.to(ptr.dtype.element_ty)
    if is_stored_by_eights(ptr.dtype.element_ty):
        EIGHTS: tl.constexpr = value.shape[1] // 8
        value = tl.reshape(value, (value.shape[0], EIGHTS, 8))
        columns = tl.reshape(columns, (EIGHTS, 8))
        # Triton knew that, and forgets it with the shape.
        columns = tl.multiple_of(tl.max_contiguous(columns, (1, 8)), (1, 8))[None, :, :]
        rows = rows[:, None, None]
    else:
        rows, columns = rows[:, None], columns[None, :]
    mask = (rows < ROWS) & (columns < COLUMNS)
    tl.store(ptr + rows * stride + columns, value, mask=mask)


@triton.jit
def load_row(ptr, columns, COLUMNS):
    """ptr[columns] in float32, zero outside."""
    return tl.load(ptr + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)


@triton.jit
def row_moments(
    x_ptr, stride_x, ROWS, K, epsilon, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Mean and 1 / sqrt(variance + epsilon) of BLOCK_M rows of x (ROWS, K), (BLOCK_M, 1) each.

    Sums are of what differs from the mean of the first columns: squares of large numbers close to
    each other would cancel.
    """
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    first = load_tile(x_ptr, stride_x, rows, columns, ROWS, K).to(tl.float32)
    center = (tl.sum(first, 1) / tl.minimum(K, BLOCK_K))[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=3):
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
    """x W for BLOCK_M rows, of x's layer norm where there is an epsilon, (BLOCK_M, BLOCK_R).

    x (ROWS, K), W (K, R); the sums are float32.
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
        w = load_transposed(w_ptr, stride_w, inner, ranks, K, R, is_shared(PRECISION, BLOCK_M))
        middle = tl.dot(x, w, middle, input_precision=PRECISION)
    return middle


@triton.jit
def expand(
    middle, w_ptr, stride_w, bias_ptr, residual_ptr, stride_residual, y_ptr, ROWS, N, R, begin, end,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """act(middle Wᵀ + b) + residual in the columns from begin to end.  W (N, R), y (ROWS, N)."""
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
