"""Sums over all rows by split-k: gradients of weights and biases.

The outputs are few tiles and the rows are many, so one program a tile would leave the GPU idle.
Split-k divides the rows: each program stores the partial sum of its split in float32, and
`sum_splits_kernel` adds the splits in a fixed order. There are no atomics, so results repeat bit
for bit.
"""

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
    store_tile,
)
from adacomcat.kernels.launch import (
    as_matrix,
    contiguous_rows,
    launch,
    one_stage_if_unaligned,
    stride,
)

Gradient = Tensor | None


@triton.jit
def rows_of_split(split, M, rows_per_split):
    """The first row of a split (int64), and its number of rows (int32)."""
    first = split.to(tl.int64) * rows_per_split
    return first, tl.minimum(M - first, rows_per_split).to(tl.int32)


@triton.jit
def sum_splits_kernel(partial_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = Σ_s partial[s, i], in the order of s."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        # tl.cast, because a size of 1 is a constant without `to`.
        offset = split * tl.cast(size, tl.int64)
        total += tl.load(partial_ptr + offset + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def row_sum_kernel(
    a_ptr, b_ptr, out_ptr, M, N, stride_a, stride_b, rows_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of Σ_rows a * b, or without b of Σ_rows a: a, b (M, N) → (N,)."""
    split = tl.program_id(1)
    first, remaining = rows_of_split(split, M, rows_per_split)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, remaining, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        a = load_tile(a_ptr + first * stride_a, stride_a, rows, columns, remaining, N)
        a = a.to(tl.float32)
        if b_ptr is not None:
            b = load_tile(b_ptr + first * stride_b, stride_b, rows, columns, remaining, N)
            a *= b.to(tl.float32)
        total += tl.sum(a, 0)
    value = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + split * N + columns, value, mask=columns < N)


@triton.jit
def weight_grad_kernel(
    a_ptr, b_ptr, scale_ptr, out_ptr, M, N, R, stride_a, stride_b, rows_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of (aᵀ b) * scale: a (M, N), b (M, R), scale (R,)."""
    split = tl.program_id(2)
    first, remaining = rows_of_split(split, M, rows_per_split)
    a_ptr += first * stride_a
    b_ptr += first * stride_b
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, remaining, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        a = load_mn_major(a_ptr, stride_a, rows, columns, remaining, N, PRECISION == "tf32")
        b = load_mn_major(
            b_ptr, stride_b, rows, ranks, remaining, R, reads_rhs_from_shared(PRECISION, BLOCK_N)
        )
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    if scale_ptr is not None:
        total *= load_row(scale_ptr, ranks, R)[None, :]
    store_tile(out_ptr + split.to(tl.int64) * N * R, R, columns, ranks, N, R, total)


@triton.jit
def weight_and_bias_grads_kernel(
    grad_ptr, middle_ptr, u_ptr, bias_ptr, du_ptr, dbias_ptr,
    M, N, R, stride_grad, stride_middle, stride_u, rows_per_split,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of dU = gᵀ middle and db = Σ_rows g, with g = grad * act'(middle Uᵀ + b).

    g is computed tile by tile and never written.
    """
    split = tl.program_id(1)
    first, remaining = rows_of_split(split, M, rows_per_split)
    grad_ptr += first * stride_grad
    middle_ptr += first * stride_middle
    columns, ranks = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    u = load_tile(u_ptr, stride_u, columns, ranks, N, R)
    du = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, remaining, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        middle = load_tile(middle_ptr, stride_middle, rows, ranks, remaining, R)
        # `pre` and `g` are (BLOCK_N, BLOCK_M), so that g is the lhs of gᵀ middle as it is.
        pre = tl.dot(u, tl.trans(middle), input_precision=PRECISION)
        if bias_ptr is not None:
            pre += load_row(bias_ptr, columns, N)[:, None]
        grad = load_tile(grad_ptr, stride_grad, rows, columns, remaining, N).to(tl.float32)
        # A tile that is loaded and directly transposed is copied 32 bits at a time. The product
        # with the transposed derivative comes first, so that `grad` is copied 128 bits at a time.
        derivative = tl.trans(activation_grad(pre, ACTIVATION, u.dtype))
        g = tl.trans(grad * derivative)
        du = tl.dot(g.to(u.dtype), middle, du, input_precision=PRECISION)
        dbias += tl.sum(g, 1)
    if du_ptr is not None:
        store_tile(du_ptr + split.to(tl.int64) * N * R, R, columns, ranks, N, R, du)
    if dbias_ptr is not None:
        value = dbias.to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + split * N + columns, value, mask=columns < N)


@triton.jit
def hidden_grads_kernel(
    middle1_ptr, dmiddle2_ptr, u1_ptr, b1_ptr, v2_ptr, du1_ptr, db1_ptr, dv2_ptr,
    M, H, R1, R2, stride_middle1, stride_dmiddle2, stride_u1, stride_v2, rows_per_split,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R1: tl.constexpr, BLOCK_R2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of dU1 = gᵀ middle1, db1 = Σ_rows g, dV2 = hᵀ dmiddle2, for BLOCK_N hidden units.

    h = act(pre) and g = (dmiddle2 V2ᵀ) * act'(pre), with pre = middle1 U1ᵀ + b1, are computed tile
    by tile as (BLOCK_N, BLOCK_M) and never written.
    """
    split = tl.program_id(1)
    first, remaining = rows_of_split(split, M, rows_per_split)
    middle1_ptr += first * stride_middle1
    dmiddle2_ptr += first * stride_dmiddle2
    hidden = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks1, ranks2 = tl.arange(0, BLOCK_R1), tl.arange(0, BLOCK_R2)
    u1 = load_tile(u1_ptr, stride_u1, hidden, ranks1, H, R1)
    v2 = load_tile(v2_ptr, stride_v2, hidden, ranks2, H, R2)
    du1 = tl.zeros((BLOCK_N, BLOCK_R1), tl.float32)
    dv2 = tl.zeros((BLOCK_N, BLOCK_R2), tl.float32)
    db1 = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, remaining, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        middle1 = load_tile(middle1_ptr, stride_middle1, rows, ranks1, remaining, R1)
        dmiddle2 = load_tile(dmiddle2_ptr, stride_dmiddle2, rows, ranks2, remaining, R2)
        pre = tl.dot(u1, tl.trans(middle1), input_precision=PRECISION)
        if b1_ptr is not None:
            pre += load_row(b1_ptr, hidden, H)[:, None]
        if dv2_ptr is not None:
            h = activate(pre, ACTIVATION, v2.dtype).to(v2.dtype)
            dv2 = tl.dot(h, dmiddle2, dv2, input_precision=PRECISION)
        g = tl.dot(v2, tl.trans(dmiddle2), input_precision=PRECISION)
        if ACTIVATION is not None:
            g *= activation_grad(pre, ACTIVATION, u1.dtype)
        if du1_ptr is not None:
            du1 = tl.dot(g.to(u1.dtype), middle1, du1, input_precision=PRECISION)
        if db1_ptr is not None:
            db1 += tl.sum(g, 1)
    if du1_ptr is not None:
        store_tile(du1_ptr + split.to(tl.int64) * H * R1, R1, hidden, ranks1, H, R1, du1)
    if dv2_ptr is not None:
        store_tile(dv2_ptr + split.to(tl.int64) * H * R2, R2, hidden, ranks2, H, R2, dv2)
    if db1_ptr is not None:
        value = db1.to(db1_ptr.dtype.element_ty)
        tl.store(db1_ptr + split * H + hidden, value, mask=hidden < H)


def empty_partial(x: Tensor, splits: int, *shape: int) -> Tensor:
    """Memory for partial sums, (splits, *shape): float32, or x's type with a single split."""
    return x.new_empty(splits, *shape, dtype=torch.float32 if splits > 1 else x.dtype)


def sum_splits(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over the first dimension in a fixed order, rounded to `dtype`: (splits, ...) → (...)."""
    splits, *shape = partial.shape
    if splits == 1:
        return partial.squeeze(0)
    out = partial.new_empty(shape, dtype=dtype)
    grid = (triton.cdiv(out.numel(), 512),)
    launch(sum_splits_kernel, grid, partial, partial, out, out.numel(), SPLITS=splits, BLOCK=512)
    return out


def row_sum(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Σ a * b over all rows, or without b Σ a: (..., n) → (n,).

    `weight_grad` reads the same rows but does not compute this sum. If a tile feeds both a sum and
    a wgmma, triton 3.8 for sm_90 allocates two buffers and refills one while the wgmma may still
    read it: a race, which the emulator in tests/gpu/ptx reports.
    """
    a, b = as_matrix(a), None if b is None else as_matrix(b)
    m, n = a.shape
    tile = tiles.Tile(BLOCK_M=64, BLOCK_K=64, BLOCK_N=64, num_warps=4, num_stages=2)
    columns = triton.cdiv(n, tile.BLOCK_N)
    splits = tiles.splits(m, tile.BLOCK_M, columns)
    total = empty_partial(a, splits, n)
    launch(
        row_sum_kernel, (columns, splits), a,
        a, b, total, m, n, a.stride(0), stride(b), split_rows(m, splits, tile.BLOCK_M),
        **tile.arguments(without="BLOCK_K"),
    )  # fmt: skip
    return sum_splits(total, a.dtype)


def weight_grad(a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
    """(aᵀ b) * scale over all rows: a (..., n), b (..., r), scale (r,) → (n, r)."""
    a, b = as_matrix(a), as_matrix(b)
    (m, n), r = a.shape, b.shape[1]
    tile = tiles.reduction_tile(m, min(r, 64), a)
    block_r = min(tiles.padded(r), 64)
    n_tiles, r_tiles = triton.cdiv(n, tile.BLOCK_N), triton.cdiv(r, block_r)
    splits = tiles.splits(m, tile.BLOCK_M, n_tiles * r_tiles)
    out = empty_partial(a, splits, n, r)
    launch(
        weight_grad_kernel, (n_tiles, r_tiles, splits), a,
        a, b, None if scale is None else scale.contiguous(), out,
        m, n, r, a.stride(0), b.stride(0), split_rows(m, splits, tile.BLOCK_M),
        BLOCK_R=block_r, PRECISION=tiles.precision(a), **tile.arguments(without="BLOCK_K"),
        **tiles.registers(tile),
    )  # fmt: skip
    return sum_splits(out, a.dtype)


def weight_and_bias_grads(
    grad: Tensor,
    middle: Tensor,
    u: Tensor,
    bias: Tensor | None,
    activation: str,
    needs: tuple[bool, bool],
) -> tuple[Gradient, Gradient]:
    """dU = gᵀ middle and db = Σ_rows g with g = grad * act'(middle Uᵀ + b); None if not needed.

    Args:
        grad, middle: (..., n) and (..., r).
        u, bias: (n, r) and (n,).
        needs: whether dU and db are needed.
    """
    if not any(needs):
        return None, None
    grad, middle, u = as_matrix(grad), as_matrix(middle), contiguous_rows(u)
    (m, n), r = grad.shape, u.shape[1]
    tile = tiles.reduction_tile(m, r, grad)
    n_tiles = triton.cdiv(n, tile.BLOCK_N)
    splits = tiles.splits(m, tile.BLOCK_M, n_tiles)
    du = empty_partial(grad, splits, n, r) if needs[0] else None
    dbias = empty_partial(grad, splits, n) if needs[1] else None
    launch(
        weight_and_bias_grads_kernel, (n_tiles, splits), grad,
        grad, middle, u, None if bias is None else bias.contiguous(), du, dbias,
        m, n, r, grad.stride(0), middle.stride(0), u.stride(0),
        split_rows(m, splits, tile.BLOCK_M), ACTIVATION=activation, BLOCK_R=tiles.padded(r),
        PRECISION=tiles.precision(grad), **tile.arguments(without="BLOCK_K"),
        **tiles.registers(tile),
    )  # fmt: skip
    du, dbias = (None if t is None else sum_splits(t, grad.dtype) for t in (du, dbias))
    return du, dbias


def hidden_grads(
    middle1: Tensor,
    dmiddle2: Tensor | None,
    u1: Tensor,
    b1: Tensor | None,
    v2: Tensor,
    activation: str | None,
    need_u1: bool,
    need_b1: bool,
    need_v2: bool,
) -> tuple[Gradient, Gradient, Gradient]:
    """The MLP's dU1 = gᵀ middle1, db1 = Σ_rows g and dV2 = hᵀ dmiddle2; None if not needed.

    h = act(pre) and g = (dmiddle2 V2ᵀ) * act'(pre), with pre = middle1 U1ᵀ + b1.

    Args:
        middle1, dmiddle2: x V1 (..., r1), and the gradient of h V2 (..., r2).
        u1, b1, v2: (hidden, r1), (hidden,), (hidden, r2).
    """
    if dmiddle2 is None or not (need_u1 or need_b1 or need_v2):
        return None, None, None
    a, b = as_matrix(middle1), as_matrix(dmiddle2)
    (m, r1), (h, r2) = a.shape, v2.shape
    # The kernel accumulates two tiles at once, so each gets half the registers.
    tile = tiles.reduction_tile(m, 2 * max(r1, r2), a, reads_columns=False)
    tile = one_stage_if_unaligned(tile, a, b)
    single = tiles.operand_bytes(a) == 4
    columns = triton.cdiv(h, tile.BLOCK_N)
    splits = tiles.splits(m, tile.BLOCK_M, columns)
    du1 = empty_partial(a, splits, h, r1) if need_u1 else None
    db1 = empty_partial(a, splits, h) if need_b1 else None
    dv2 = empty_partial(a, splits, h, r2) if need_v2 else None
    launch(
        hidden_grads_kernel, (columns, splits), a,
        a, b, u1, b1, v2, du1, db1, dv2, m, h, r1, r2,
        a.stride(0), b.stride(0), u1.stride(0), v2.stride(0),
        split_rows(m, splits, tile.BLOCK_M), ACTIVATION=activation,
        BLOCK_R1=tiles.padded(r1), BLOCK_R2=tiles.padded(r2), PRECISION=tiles.precision(a),
        **tile.arguments(without="BLOCK_K"),
        **tiles.registers(tile, blocks=1 if single else 2, always=single),
    )  # fmt: skip
    du1, db1, dv2 = (None if t is None else sum_splits(t, a.dtype) for t in (du1, db1, dv2))
    return du1, db1, dv2


def split_rows(rows: int, splits: int, block: int) -> int:
    """Rows of one split, a multiple of `block`; the last split has the remainder."""
    return max(1, triton.cdiv(triton.cdiv(rows, splits), block)) * block
