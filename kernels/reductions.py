"""Sums over all rows: gradients of weights and biases.

Few output tiles and many rows leave a GPU idle, so rows are split into parts, each program writes
the sum of its part in float32, and a second kernel adds the parts in a fixed order: no atomics,
the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels import tiles
from adacomcat.kernels.activations import activate, slope
from adacomcat.kernels.blocks import is_shared, load_row, load_tile, load_transposed, store_tile
from adacomcat.kernels.launch import adjacent, launch, rows, staged_alike, stride

Gradient = Tensor | None


@triton.jit
def sum_parts_kernel(parts_ptr, out_ptr, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = Σ_p parts[p, i], in the order of p."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_ptr + part * size.to(tl.int64) + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def row_sum_kernel(
    a_ptr, b_ptr, out_ptr, M, N, stride_a, stride_b, rows_per_part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One part of Σ_rows a * b, or of Σ_rows a: a, b (M, N) → (N,)."""
    part = tl.program_id(1)
    first = part.to(tl.int64) * rows_per_part
    left = tl.minimum(M - first, rows_per_part).to(tl.int32)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, left, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        a = load_tile(a_ptr + first * stride_a, stride_a, rows, columns, left, N).to(tl.float32)
        if b_ptr is not None:
            b = load_tile(b_ptr + first * stride_b, stride_b, rows, columns, left, N)
            a *= b.to(tl.float32)
        total += tl.sum(a, 0)
    value = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + part * N + columns, value, mask=columns < N)


@triton.jit
def weight_grad_kernel(
    a_ptr, b_ptr, scale_ptr, out_ptr, M, N, R, stride_a, stride_b, rows_per_part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of (aᵀ b) * scale, a (M, N), b (M, R)."""
    part = tl.program_id(2)
    first = part.to(tl.int64) * rows_per_part
    left = tl.minimum(M - first, rows_per_part).to(tl.int32)
    a_ptr += first * stride_a
    b_ptr += first * stride_b
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, left, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        a = load_transposed(a_ptr, stride_a, rows, columns, left, N, PRECISION == "tf32")
        b = load_transposed(b_ptr, stride_b, rows, ranks, left, R, is_shared(PRECISION, BLOCK_N))
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    if scale_ptr is not None:
        total *= load_row(scale_ptr, ranks, R)[None, :]
    store_tile(out_ptr + part.to(tl.int64) * N * R, R, columns, ranks, N, R, total)


@triton.jit
def weight_grads_kernel(
    grad_ptr, middle_ptr, u_ptr, bias_ptr, du_ptr, dbias_ptr,
    M, N, R, stride_grad, stride_middle, stride_u, rows_per_part,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of dU = gᵀ middle and db = Σ g, where g = grad * act'(middle Uᵀ + b) stays here."""
    part = tl.program_id(1)
    first = part.to(tl.int64) * rows_per_part
    left = tl.minimum(M - first, rows_per_part).to(tl.int32)
    grad_ptr += first * stride_grad
    middle_ptr += first * stride_middle
    columns, ranks = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    u = load_tile(u_ptr, stride_u, columns, ranks, N, R)
    du = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, left, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        middle = load_tile(middle_ptr, stride_middle, rows, ranks, left, R)
        # Transposed, (BLOCK_N, BLOCK_M): its product with `middle` needs no further transposition.
        pre = tl.dot(u, tl.trans(middle), input_precision=PRECISION)
        if bias_ptr is not None:
            pre += load_row(bias_ptr, columns, N)[:, None]
        grad = load_tile(grad_ptr, stride_grad, rows, columns, left, N)
        # The slope is transposed there and back, so that the tile of gradients keeps the layout in
        # which it is read: one that goes straight into a transposition is copied 32 bits at a time.
        g = tl.trans(grad.to(tl.float32) * tl.trans(slope(pre, ACTIVATION, u.dtype)))
        du = tl.dot(g.to(u.dtype), middle, du, input_precision=PRECISION)
        dbias += tl.sum(g, 1)
    if du_ptr is not None:
        store_tile(du_ptr + part.to(tl.int64) * N * R, R, columns, ranks, N, R, du)
    if dbias_ptr is not None:
        value = dbias.to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + part * N + columns, value, mask=columns < N)


@triton.jit
def hidden_grads_kernel(
    middle1_ptr, dmiddle2_ptr, u1_ptr, b1_ptr, v2_ptr, du1_ptr, db1_ptr, dv2_ptr,
    M, H, R1, R2, stride_middle1, stride_dmiddle2, stride_u1, stride_v2, rows_per_part,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R1: tl.constexpr, BLOCK_R2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of dU1 = gᵀ middle1, db1 = Σ g and dV2 = hᵀ dmiddle2 for BLOCK_N hidden units.

    h and g = dmiddle2 V2ᵀ * act' are computed here, transposed, and not written.
    """
    part = tl.program_id(1)
    first = part.to(tl.int64) * rows_per_part
    left = tl.minimum(M - first, rows_per_part).to(tl.int32)
    middle1_ptr += first * stride_middle1
    dmiddle2_ptr += first * stride_dmiddle2
    hidden = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks1, ranks2 = tl.arange(0, BLOCK_R1), tl.arange(0, BLOCK_R2)
    u1 = load_tile(u1_ptr, stride_u1, hidden, ranks1, H, R1)
    v2 = load_tile(v2_ptr, stride_v2, hidden, ranks2, H, R2)
    du1 = tl.zeros((BLOCK_N, BLOCK_R1), tl.float32)
    dv2 = tl.zeros((BLOCK_N, BLOCK_R2), tl.float32)
    db1 = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, left, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        middle1 = load_tile(middle1_ptr, stride_middle1, rows, ranks1, left, R1)
        dmiddle2 = load_tile(dmiddle2_ptr, stride_dmiddle2, rows, ranks2, left, R2)
        pre = tl.dot(u1, tl.trans(middle1), input_precision=PRECISION)
        if b1_ptr is not None:
            pre += load_row(b1_ptr, hidden, H)[:, None]
        if dv2_ptr is not None:
            h = activate(pre, ACTIVATION, v2.dtype).to(v2.dtype)
            dv2 = tl.dot(h, dmiddle2, dv2, input_precision=PRECISION)
        g = tl.dot(v2, tl.trans(dmiddle2), input_precision=PRECISION)
        if ACTIVATION is not None:
            g *= slope(pre, ACTIVATION, u1.dtype)
        if du1_ptr is not None:
            du1 = tl.dot(g.to(u1.dtype), middle1, du1, input_precision=PRECISION)
        if db1_ptr is not None:
            db1 += tl.sum(g, 1)
    if du1_ptr is not None:
        store_tile(du1_ptr + part.to(tl.int64) * H * R1, R1, hidden, ranks1, H, R1, du1)
    if dv2_ptr is not None:
        store_tile(dv2_ptr + part.to(tl.int64) * H * R2, R2, hidden, ranks2, H, R2, dv2)
    if db1_ptr is not None:
        value = db1.to(db1_ptr.dtype.element_ty)
        tl.store(db1_ptr + part * H + hidden, value, mask=hidden < H)


def parts_of(x: Tensor, parts: int, *shape: int) -> Tensor:
    """Room for the parts of a sum: in float32, or of the final type where there is only one."""
    return x.new_empty(parts, *shape, dtype=torch.float32 if parts > 1 else x.dtype)


def sum_parts(parts: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Σ over the first dimension, in a fixed order."""
    if parts is None or parts.shape[0] == 1:
        return None if parts is None else parts.squeeze(0)
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    grid = (triton.cdiv(out.numel(), 512),)
    launch(sum_parts_kernel, grid, parts, parts, out, out.numel(), PARTS=parts.shape[0], BLOCK=512)
    return out


def row_sum(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Σ a * b over all rows, or Σ a: (..., n) → (n,).

    A kernel of its own, although `weight_grad` reads the same rows for the gradient of a bias: with
    a tile that goes into both a sum and a tensor-core product, triton 3.8 for sm_90 keeps two
    buffers and refills one while the product may still read it (the race check finds it).
    """
    a, b = rows(a), None if b is None else rows(b)
    m, n = a.shape
    tile = tiles.Tile(BLOCK_M=64, BLOCK_K=64, BLOCK_N=64, num_warps=4, num_stages=2)
    columns = triton.cdiv(n, tile.BLOCK_N)
    parts = tiles.splits(m, tile.BLOCK_M, columns)
    total = parts_of(a, parts, n)
    launch(
        row_sum_kernel, (columns, parts), a,
        a, b, total, m, n, a.stride(0), stride(b), part_rows(m, parts, tile.BLOCK_M),
        **tile.arguments(without="BLOCK_K"),
    )  # fmt: skip
    return sum_parts(total, a.dtype)


def weight_grad(a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
    """(aᵀ b) * scale over all rows: a (..., n), b (..., r), scale (r,) → (n, r)."""
    a, b = rows(a), rows(b)
    (m, n), r = a.shape, b.shape[1]
    tile = tiles.reduction_tile(m, min(r, 64), a)
    block_r = min(tiles.padded(r), 64)
    n_tiles, r_tiles = triton.cdiv(n, tile.BLOCK_N), triton.cdiv(r, block_r)
    parts = tiles.splits(m, tile.BLOCK_M, n_tiles * r_tiles)
    out = parts_of(a, parts, n, r)
    launch(
        weight_grad_kernel, (n_tiles, r_tiles, parts), a,
        a, b, None if scale is None else scale.contiguous(), out,
        m, n, r, a.stride(0), b.stride(0), part_rows(m, parts, tile.BLOCK_M),
        BLOCK_R=block_r, PRECISION=tiles.precision(a), **tile.arguments(without="BLOCK_K"),
        **tiles.registers(tile),
    )  # fmt: skip
    return sum_parts(out, a.dtype)


def weight_grads(
    grad: Tensor,
    middle: Tensor,
    u: Tensor,
    bias: Tensor | None,
    activation: str,
    needs: tuple[bool, bool],
) -> tuple[Gradient, Gradient]:
    """gᵀ middle and Σ g with g = grad * act'(middle Uᵀ + b): the gradients of U and b."""
    if not any(needs):
        return None, None
    grad, middle, u = rows(grad), rows(middle), adjacent(u)
    (m, n), r = grad.shape, u.shape[1]
    tile = tiles.reduction_tile(m, r, grad)
    n_tiles = triton.cdiv(n, tile.BLOCK_N)
    parts = tiles.splits(m, tile.BLOCK_M, n_tiles)
    du = parts_of(grad, parts, n, r) if needs[0] else None
    dbias = parts_of(grad, parts, n) if needs[1] else None
    launch(
        weight_grads_kernel, (n_tiles, parts), grad,
        grad, middle, u, None if bias is None else bias.contiguous(), du, dbias,
        m, n, r, grad.stride(0), middle.stride(0), u.stride(0),
        part_rows(m, parts, tile.BLOCK_M), ACTIVATION=activation, BLOCK_R=tiles.padded(r),
        PRECISION=tiles.precision(grad), **tile.arguments(without="BLOCK_K"),
        **tiles.registers(tile),
    )  # fmt: skip
    return sum_parts(du, grad.dtype), sum_parts(dbias, grad.dtype)


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
    """The gradients of U1, b1 and V2, whose sums run over the rows of the hidden layer."""
    if not (need_u1 or need_b1 or need_v2):
        return None, None, None
    a, b = rows(middle1), rows(dmiddle2)
    (m, r1), (h, r2) = a.shape, v2.shape
    # Two sums are alive at once, hence half the size that one would get.
    tile = tiles.reduction_tile(m, 2 * max(r1, r2), a, reads_columns=False)
    tile = staged_alike(tile, a, b)
    single = tiles.operand_bytes(a) == 4
    columns = triton.cdiv(h, tile.BLOCK_N)
    parts = tiles.splits(m, tile.BLOCK_M, columns)
    du1 = parts_of(a, parts, h, r1) if need_u1 else None
    db1 = parts_of(a, parts, h) if need_b1 else None
    dv2 = parts_of(a, parts, h, r2) if need_v2 else None
    launch(
        hidden_grads_kernel, (columns, parts), a,
        a, b, u1, b1, v2, du1, db1, dv2, m, h, r1, r2,
        a.stride(0), b.stride(0), u1.stride(0), v2.stride(0),
        part_rows(m, parts, tile.BLOCK_M), ACTIVATION=activation,
        BLOCK_R1=tiles.padded(r1), BLOCK_R2=tiles.padded(r2), PRECISION=tiles.precision(a),
        **tile.arguments(without="BLOCK_K"),
        **tiles.registers(tile, blocks=1 if single else 2, always=single),
    )  # fmt: skip
    return tuple(sum_parts(parts, a.dtype) for parts in (du1, db1, dv2))


def part_rows(rows: int, parts: int, block: int) -> int:
    """Rows of one part: whole blocks, the last part takes what is left."""
    return max(1, triton.cdiv(triton.cdiv(rows, parts), block)) * block
