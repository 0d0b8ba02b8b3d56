"""low_rank_mlp: (h V2) U2ᵀ + b2 with h = act((x V1) U1ᵀ + b1), and its gradients.

For inference x may be its layer norm, taken on the way, and the output gets a residual.

One program owns BLOCK_M rows. x V1 stays on the chip; each tile of the hidden layer is computed
from it, used at once for h V2, and forgotten: the hidden layer, four times as wide as x, is never
written, and neither product is computed twice. The gradient of x walks the same way back.

Few rows would leave most of a GPU idle. There several programs own the same rows, each of which
computes x V1 and its part of the hidden layer, and writes its part of the sum h V2 in float32; a
second kernel adds the parts in a fixed order and goes on to the output; likewise for the gradient
of x. The parts are as many bytes as the weights, but stay in the L2 cache, and every processor then
reads a tenth of the factors of the hidden layer. Where V1 is large, x V1 is a product of its own.

A wide rank leaves no registers for all this, and is two low-rank layers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels import low_rank_linear, tiles
from adacomcat.kernels.activations import activate, slope
from adacomcat.kernels.blocks import (
    contract,
    expand,
    is_shared,
    load_row,
    load_tile,
    load_transposed,
    store_tile,
)
from adacomcat.kernels.launching import adjacent, launch, rows, staged_alike, stride
from adacomcat.kernels.normalization import normalize
from adacomcat.kernels.products import product, project
from adacomcat.kernels.reductions import hidden_grads, row_sum, weight_grad

Gradient = Tensor | None


@triton.jit
def low_rank_mlp_kernel(
    x_ptr, v1_ptr, u1_ptr, b1_ptr, v2_ptr, u2_ptr, b2_ptr, residual_ptr, y_ptr,
    middle1_ptr, middle2_ptr, parts_ptr, epsilon, M, K, H, N, R1, R2,
    stride_x, stride_v1, stride_u1, stride_v2, stride_u2, stride_residual,
    hidden_per_part, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R1: tl.constexpr, BLOCK_R2: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """y, and where pointers are given x V1 and h V2; or one part of h V2 where parts are wanted.

    Without x, x V1 is read.
    """
    dtype: tl.constexpr = u1_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    left = (M - first).to(tl.int32)
    rows, ranks1, ranks2 = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R1), tl.arange(0, BLOCK_R2)
    if x_ptr is not None:
        middle = contract(
            x_ptr + first * stride_x, stride_x, v1_ptr, stride_v1, epsilon, left, K, R1,
            BLOCK_M, BLOCK_K, BLOCK_R1, PRECISION,
        )  # fmt: skip
        if middle1_ptr is not None:
            kept = tl.where(tl.program_id(1) == 0, left, 0)  # one of those that share rows writes
            store_tile(middle1_ptr + first * R1, R1, rows, ranks1, kept, R1, middle)
        middle1 = middle.to(dtype)
    else:
        middle1 = load_tile(middle1_ptr + first * R1, R1, rows, ranks1, left, R1)
    middle2 = tl.zeros((BLOCK_M, BLOCK_R2), tl.float32)
    begin = tl.program_id(1) * hidden_per_part
    for start in range(begin, tl.minimum(begin + hidden_per_part, H), BLOCK_N):
        hidden = start + tl.arange(0, BLOCK_N)
        u1 = load_tile(u1_ptr, stride_u1, hidden, ranks1, H, R1, WHOLE)
        h = tl.dot(middle1, tl.trans(u1), input_precision=PRECISION)
        if b1_ptr is not None:
            h += load_row(b1_ptr, hidden, H)[None, :]
        h = activate(h, ACTIVATION, dtype).to(dtype)
        shared: tl.constexpr = is_shared(PRECISION, BLOCK_M)
        v2 = load_transposed(v2_ptr, stride_v2, hidden, ranks2, H, R2, shared, WHOLE)
        middle2 = tl.dot(h, v2, middle2, input_precision=PRECISION)
    if parts_ptr is not None:
        parts_ptr += (tl.program_id(1).to(tl.int64) * M + first) * R2
        store_tile(parts_ptr, R2, rows, ranks2, left, R2, middle2)
    else:
        if middle2_ptr is not None:
            store_tile(middle2_ptr + first * R2, R2, rows, ranks2, left, R2, middle2)
        if residual_ptr is not None:
            residual_ptr += first * stride_residual
        expand(
            middle2.to(dtype), u2_ptr, stride_u2, b2_ptr, residual_ptr, stride_residual,
            y_ptr + first * N, left, N, R2, 0, N, None, BLOCK_M, BLOCK_N, BLOCK_R2, PRECISION,
        )  # fmt: skip


@triton.jit
def expand_parts_kernel(
    parts_ptr, u_ptr, bias_ptr, residual_ptr, y_ptr, middle_ptr,
    M, N, R, PARTS, stride_parts, stride_u, stride_residual, columns_per_part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = middle Uᵀ + b + residual with middle = Σ parts in order, (PARTS, M, R) in float32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    left = (M - first).to(tl.int32)
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    middle = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    parts_ptr += first * R
    for _ in range(PARTS):
        middle += load_tile(parts_ptr, R, rows, ranks, left, R)
        parts_ptr += stride_parts
    if middle_ptr is not None:
        kept = tl.where(tl.program_id(1) == 0, left, 0)
        store_tile(middle_ptr + first * R, R, rows, ranks, kept, R, middle)
    if residual_ptr is not None:
        residual_ptr += first * stride_residual
    begin = tl.program_id(1) * columns_per_part
    expand(
        middle.to(y_ptr.dtype.element_ty), u_ptr, stride_u, bias_ptr,
        residual_ptr, stride_residual, y_ptr + first * N, left, N, R,
        begin, tl.minimum(begin + columns_per_part, N), None,
        BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip


@triton.jit
def low_rank_mlp_backward_kernel(
    grad_ptr, u2_ptr, v2_ptr, middle1_ptr, u1_ptr, b1_ptr, v1_ptr,
    dx_ptr, dmiddle1_ptr, dmiddle2_ptr, parts_ptr,
    M, K, H, N, R1, R2, stride_grad, stride_middle1, stride_v1, stride_u1, stride_v2, stride_u2,
    hidden_per_part, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R1: tl.constexpr, BLOCK_R2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dmiddle2 = grad U2, dmiddle1 = (dmiddle2 V2ᵀ * act') U1, dx = dmiddle1 V1ᵀ.

    Where parts are wanted, one of dmiddle1 and no more. Without grad, dmiddle2 is read.
    """
    dtype: tl.constexpr = u1_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    left = (M - first).to(tl.int32)
    rows, ranks1, ranks2 = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R1), tl.arange(0, BLOCK_R2)
    if grad_ptr is not None:
        dmiddle = contract(
            grad_ptr + first * stride_grad, stride_grad, u2_ptr, stride_u2, None, left, N, R2,
            BLOCK_M, BLOCK_K, BLOCK_R2, PRECISION,
        )  # fmt: skip
        if dmiddle2_ptr is not None:
            kept = tl.where(tl.program_id(1) == 0, left, 0)
            store_tile(dmiddle2_ptr + first * R2, R2, rows, ranks2, kept, R2, dmiddle)
        dmiddle2 = dmiddle.to(dtype)
    else:
        dmiddle2 = load_tile(dmiddle2_ptr + first * R2, R2, rows, ranks2, left, R2)
    middle1_ptr += first * stride_middle1
    middle1 = load_tile(middle1_ptr, stride_middle1, rows, ranks1, left, R1)
    dmiddle1 = tl.zeros((BLOCK_M, BLOCK_R1), tl.float32)
    begin = tl.program_id(1) * hidden_per_part
    for start in range(begin, tl.minimum(begin + hidden_per_part, H), BLOCK_N):
        hidden = start + tl.arange(0, BLOCK_N)
        u1 = load_tile(u1_ptr, stride_u1, hidden, ranks1, H, R1)
        pre = tl.dot(middle1, tl.trans(u1), input_precision=PRECISION)
        if b1_ptr is not None:
            pre += load_row(b1_ptr, hidden, H)[None, :]
        v2 = load_tile(v2_ptr, stride_v2, hidden, ranks2, H, R2)
        dh = tl.dot(dmiddle2, tl.trans(v2), input_precision=PRECISION)
        if ACTIVATION is not None:
            dh *= slope(pre, ACTIVATION, dtype)
        dmiddle1 = tl.dot(dh.to(dtype), u1, dmiddle1, input_precision=PRECISION)
    if parts_ptr is not None:
        parts_ptr += (tl.program_id(1).to(tl.int64) * M + first) * R1
        store_tile(parts_ptr, R1, rows, ranks1, left, R1, dmiddle1)
    else:
        if dmiddle1_ptr is not None:
            store_tile(dmiddle1_ptr + first * R1, R1, rows, ranks1, left, R1, dmiddle1)
        if dx_ptr is not None:
            expand(
                dmiddle1.to(dtype), v1_ptr, stride_v1, None, None, 0, dx_ptr + first * K,
                left, K, R1, 0, K, None, BLOCK_M, BLOCK_N, BLOCK_R1, PRECISION,
            )  # fmt: skip


def forward(
    x: Tensor,
    v1: Tensor,
    u1: Tensor,
    b1: Tensor | None,
    v2: Tensor,
    u2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    keep_intermediates: bool = True,
    tile: tiles.Tile | None = None,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(h V2) U2ᵀ + b2 + residual, and x V1 and h V2 if `keep_intermediates`.

    With an `epsilon` x is normalized first."""
    rank = max(v1.shape[1], v2.shape[1])
    wide = tiles.is_wide(rank)
    apart = wide or tiles.takes_two_launches(rows(x).shape[0], *v1.shape, x)
    if apart and epsilon is not None:
        x, epsilon = normalize(x, epsilon), None
    if wide:
        hidden, middle1 = low_rank_linear.forward(x, v1, u1, b1, activation)
        out, middle2 = low_rank_linear.forward(hidden, v2, u2, b2, None, residual)
        return out, middle1, middle2
    flat, residual = rows(x), None if residual is None else rows(residual)
    v1, u1, v2, u2 = (adjacent(t) for t in (v1, u1, v2, u2))
    b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
    (m, k), (h, r1), (n, r2) = flat.shape, u1.shape, u2.shape
    tile = tile or tiles.mlp_tile(m, rank, x)
    out = x.new_empty(*x.shape[:-1], n)
    middle1, middle2 = (x.new_empty(*x.shape[:-1], r) if keep_intermediates else None
                        for r in (r1, r2))
    if apart:
        middle1 = product(x, v1)

    def run(tile: tiles.Tile) -> None:
        tile = staged_alike(tile, u1, v2)
        grid, share, parts = _shared_out(x, m, h, r2, tile)
        whole = h % tile.BLOCK_N == 0 and (r1, r2) == (tiles.padded(r1), tiles.padded(r2))
        launch(
            low_rank_mlp_kernel, grid, x,
            None if apart else flat, v1, u1, b1, v2, u2, b2, residual, out, middle1, middle2, parts,
            epsilon, m, k, h, n, r1, r2,
            flat.stride(0), v1.stride(0), u1.stride(0), v2.stride(0), u2.stride(0),
            stride(residual), share,
            ACTIVATION=activation, BLOCK_R1=tiles.padded(r1), BLOCK_R2=tiles.padded(r2),
            PRECISION=tiles.precision(x), WHOLE=whole, **tile.arguments(),
        )  # fmt: skip
        if parts is not None:
            _expand_parts(parts, u2, b2, residual, out, middle2)

    run(tiles.best(tile, ("low_rank_mlp", m, k, h, n, r1, r2), x, run))
    return out, middle1, middle2


def backward(
    grad: Tensor,
    x: Tensor,
    v1: Tensor,
    u1: Tensor,
    b1: Tensor | None,
    v2: Tensor,
    u2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    middle1: Tensor,
    middle2: Tensor,
    needs: Sequence[bool],
    tile: tiles.Tile | None = None,
) -> tuple[Gradient, ...]:
    """The gradients of x, V1, U1, b1, V2, U2 and b2; None for those that are not needed."""
    need_x, need_v1, need_u1, need_b1, need_v2, need_u2, need_b2 = needs
    if tiles.is_wide(max(v1.shape[1], v2.shape[1])):
        need_dhidden = any(needs[:4])
        (hidden,) = project(middle1, b1, u1, activation=activation)
        dhidden, *last = low_rank_linear.backward(
            grad, hidden, v2, u2, b2, None, middle2, (need_dhidden, need_v2, need_u2, need_b2)
        )
        if not need_dhidden:
            return None, None, None, None, *last
        first = low_rank_linear.backward(
            dhidden, x, v1, u1, b1, activation, middle1, needs[:4]
        )
        return *first, *last
    v1, u1, v2, u2 = (adjacent(t) for t in (v1, u1, v2, u2))
    b1 = None if b1 is None else b1.contiguous()
    flat, kept = rows(grad), rows(middle1)
    (m, n), (k, r1), (h, r2) = flat.shape, v1.shape, v2.shape
    lead = grad.shape[:-1]
    dx = grad.new_empty(*lead, k) if need_x else None
    dmiddle1 = grad.new_empty(*lead, r1) if need_v1 else None
    need_hidden = need_u1 or need_b1 or need_v2
    dmiddle2 = grad.new_empty(*lead, r2) if need_hidden else None
    if need_x or need_v1 or need_hidden:
        # Four blocks of rows are alive at once: of more than 64 rows they spill on sm_89, in exact
        # float32 of more than 16 on sm_80. With tf32 they are fewer than a wgmma takes, because U1
        # is transposed through registers there and V2 is not.
        most = 128 // tiles.operand_bytes(grad)
        tile = tile or tiles.row_tile(m, max(r1, r2), grad, factors=2, most=most)
        tile = staged_alike(tile, u1, v2)
        apart = tiles.takes_two_launches(m, n, r2, grad)
        if apart:
            dmiddle2 = product(grad, u2)
        grid, share, parts = _shared_out(grad, m, h, r1, tile, need_x)
        launch(
            low_rank_mlp_backward_kernel, grid, grad,
            None if apart else flat, u2, v2, kept, u1, b1, v1, dx, dmiddle1, dmiddle2, parts,
            m, k, h, n, r1, r2,
            flat.stride(0), kept.stride(0),
            v1.stride(0), u1.stride(0), v2.stride(0), u2.stride(0), share,
            ACTIVATION=activation, BLOCK_R1=tiles.padded(r1), BLOCK_R2=tiles.padded(r2),
            PRECISION=tiles.precision(grad), **tile.arguments(), **tiles.registers(tile, blocks=1),
        )  # fmt: skip
        if parts is not None:
            _expand_parts(parts, v1, None, None, dx, dmiddle1)
    du1, db1, dv2 = hidden_grads(
        middle1, dmiddle2, u1, b1, v2, activation, need_u1, need_b1, need_v2
    )
    dv1 = weight_grad(x, dmiddle1) if need_v1 else None
    du2 = weight_grad(grad, middle2) if need_u2 else None
    return dx, dv1, du1, db1, dv2, du2, row_sum(grad) if need_b2 else None


def _shared_out(
    x: Tensor, m: int, h: int, r: int, tile: tiles.Tile, wanted: bool = True
) -> tuple[tuple[int, int], int, Tensor | None]:
    """The grid, hidden units a program, and room for the parts where several share the rows."""
    blocks = triton.cdiv(m, tile.BLOCK_M)
    share = tiles.columns_per_part(h, tile.BLOCK_N, blocks)
    count = triton.cdiv(h, share)
    if count < 2 or not wanted:
        return (blocks, 1), h, None
    return (blocks, count), share, x.new_empty(count, m, r, dtype=torch.float32)


def _expand_parts(
    parts: Tensor,
    u: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    middle: Tensor | None,
    tile: tiles.Tile | None = None,
) -> None:
    """out = middle Uᵀ + b + residual with middle = Σ parts.

    Every program reads all parts of its rows, hence few rows.
    """
    (count, m, r), n = parts.shape, u.shape[0]
    tile = tile or tiles.row_tile(m, r, out, least=16)
    blocks = triton.cdiv(m, tile.BLOCK_M)
    columns = tiles.columns_per_part(n, tile.BLOCK_N, blocks)
    launch(
        expand_parts_kernel, (blocks, triton.cdiv(n, columns)), parts,
        parts, u, bias, residual, out, middle,
        m, n, r, count, parts.stride(0), u.stride(0), stride(residual), columns,
        BLOCK_R=tiles.padded(r), PRECISION=tiles.precision(out),
        **tile.arguments(without="BLOCK_K"),
    )  # fmt: skip
