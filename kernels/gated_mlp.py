"""gated_mlp: (act(x̄ Wgᵀ + bg) * (x̄ W1ᵀ + b1)) V2 W2ᵀ + b2 with x̄ = x V1, for inference.

The layer norm of x may take the place of x, and a residual is added to the output. Without V1 or V2
that side is dense.

With both factors the kernel is that of low_rank_mlp with one more product, the gate: the hidden
layer is computed tile by tile and never written, and few rows are shared out by split-k.

Without V1 a program would need all of x for each tile of the hidden layer, without V2 all of the
output; a wide rank (`tiles.is_wide`) exceeds the registers. There one launch writes the hidden
layer, which is half as large as what the gate and W1 give, and the next one reads it.
"""

import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels import low_rank_linear, tiles
from adacomcat.kernels.activations import activate
from adacomcat.kernels.blocks import (
    expand,
    load_mn_major,
    load_row,
    load_tile,
    reads_rhs_from_shared,
    row_block,
    store_tile,
)
from adacomcat.kernels.expand_splits import expand_splits
from adacomcat.kernels.launch import (
    as_matrix,
    contiguous_rows,
    launch,
    one_stage_if_unaligned,
    stride,
)
from adacomcat.kernels.layer_norm import layer_norm
from adacomcat.kernels.low_rank_mlp import contract_or_load, split_hidden
from adacomcat.kernels.matmul import matmul, project, two_products


@triton.jit
def gated(gate, h, bg_ptr, b1_ptr, columns, H, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """act(gate + bg) * (h + b1) in float32, to the precision of DTYPE."""
    if bg_ptr is not None:
        gate += load_row(bg_ptr, columns, H)[None, :]
    if b1_ptr is not None:
        h += load_row(b1_ptr, columns, H)[None, :]
    return activate(gate, ACTIVATION, DTYPE) * h


@triton.jit
def gated_mlp_kernel(
    x_ptr, v1_ptr, wg_ptr, bg_ptr, w1_ptr, b1_ptr, v2_ptr, w2_ptr, b2_ptr, residual_ptr, y_ptr,
    middle_ptr, partial_ptr, epsilon, M, K, H, N, R1, R2,
    stride_x, stride_v1, stride_wg, stride_w1, stride_v2, stride_w2, stride_residual,
    hidden_per_program, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R1: tl.constexpr, BLOCK_R2: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """y = (act(x V1 Wgᵀ + bg) * (x V1 W1ᵀ + b1)) V2 W2ᵀ + b2 + residual.

    With `partial_ptr` only one split of h V2 is stored, which `expand_splits_kernel` continues.
    Without `x_ptr` x V1 is read from `middle_ptr`. FULL promises that no tile of Wg, W1 or V2 needs
    a mask. An output takes one product and a hidden unit two, so twice BLOCK_N outputs are computed
    at a time.
    """
    dtype: tl.constexpr = wg_ptr.dtype.element_ty
    first, remaining = row_block(M, BLOCK_M)
    rows, ranks1, ranks2 = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R1), tl.arange(0, BLOCK_R2)
    middle1 = contract_or_load(
        x_ptr, stride_x, v1_ptr, stride_v1, epsilon, middle_ptr, first, remaining, K, R1,
        dtype, BLOCK_M, BLOCK_K, BLOCK_R1, PRECISION,
    )  # fmt: skip
    middle2 = tl.zeros((BLOCK_M, BLOCK_R2), tl.float32)
    begin = tl.program_id(1) * hidden_per_program
    for start in range(begin, tl.minimum(begin + hidden_per_program, H), BLOCK_N):
        hidden = start + tl.arange(0, BLOCK_N)
        wg = load_tile(wg_ptr, stride_wg, hidden, ranks1, H, R1, FULL)
        gate = tl.dot(middle1, tl.trans(wg), input_precision=PRECISION)
        w1 = load_tile(w1_ptr, stride_w1, hidden, ranks1, H, R1, FULL)
        h = tl.dot(middle1, tl.trans(w1), input_precision=PRECISION)
        h = gated(gate, h, bg_ptr, b1_ptr, hidden, H, ACTIVATION, dtype).to(dtype)
        transpose: tl.constexpr = reads_rhs_from_shared(PRECISION, BLOCK_M)
        v2 = load_mn_major(v2_ptr, stride_v2, hidden, ranks2, H, R2, transpose, FULL)
        middle2 = tl.dot(h, v2, middle2, input_precision=PRECISION)
    if partial_ptr is not None:
        partial_ptr += (tl.program_id(1).to(tl.int64) * M + first) * R2
        store_tile(partial_ptr, R2, rows, ranks2, remaining, R2, middle2)
    else:
        if residual_ptr is not None:
            residual_ptr += first * stride_residual
        expand(
            middle2.to(dtype), w2_ptr, stride_w2, b2_ptr, residual_ptr, stride_residual,
            y_ptr + first * N, remaining, N, R2, 0, N, BLOCK_M, 2 * BLOCK_N, BLOCK_R2, PRECISION,
        )  # fmt: skip


@triton.jit
def gated_project_kernel(
    x_ptr, wg_ptr, bg_ptr, w1_ptr, b1_ptr, h_ptr, M, K, H, stride_x, stride_wg, stride_w1,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = act(x Wgᵀ + bg) * (x W1ᵀ + b1) for one tile of h (M, H)."""
    first, remaining = row_block(M, BLOCK_M)
    rows, columns = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate, h = two_products(
        x_ptr + first * stride_x, stride_x, wg_ptr, stride_wg, w1_ptr, stride_w1, columns,
        remaining, H, K, BLOCK_M, BLOCK_K, PRECISION,
    )  # fmt: skip
    h = gated(gate, h, bg_ptr, b1_ptr, columns, H, ACTIVATION, h_ptr.dtype.element_ty)
    store_tile(h_ptr + first * H, H, rows, columns, remaining, H, h)


def forward(
    x: Tensor,
    v1: Tensor | None,
    wg: Tensor,
    bg: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    v2: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    tile: tiles.Tile | None = None,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = (act(x̄ Wgᵀ + bg) * (x̄ W1ᵀ + b1)) V2 W2ᵀ + b2 + residual, x̄ = x V1.

    Args:
        x, residual: (..., in) and (..., out).
        v1: (in, r1), or None.
        wg, bg, w1, b1: (hidden, r1 or in), (hidden,), of the gate and of what it multiplies.
        v2, w2, b2: (hidden, r2) or None, (out, r2 or hidden), (out,).
        epsilon: if given, the layer norm of x takes the place of x.
    """
    if v1 is None or v2 is None or tiles.is_wide(max(v1.shape[1], v2.shape[1])):
        x = x if epsilon is None else layer_norm(x, epsilon)
        middle = x if v1 is None else matmul(x, contiguous_rows(v1))
        hidden = gated_project(middle, wg, bg, w1, b1, activation)
        if v2 is None:
            return project(hidden, b2, w2, residual=residual)[0]
        return low_rank_linear.forward(hidden, v2, w2, b2, None, residual, False)[0]
    return _forward_of_factors(
        x, v1, wg, bg, w1, b1, v2, w2, b2, activation, tile, epsilon, residual
    )


def _forward_of_factors(
    x: Tensor,
    v1: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    v2: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    tile: tiles.Tile | None,
    epsilon: float | None,
    residual: Tensor | None,
) -> Tensor:
    """`forward` where all factors are there and no rank is wide."""
    (k, r1), (n, r2), m = v1.shape, w2.shape, x.shape[:-1].numel()
    middle = None
    if two_launches := tiles.takes_two_launches(m, k, r1, x):
        x, epsilon = x if epsilon is None else layer_norm(x, epsilon), None
        middle = matmul(x, contiguous_rows(v1))
    flat, residual = as_matrix(x), None if residual is None else as_matrix(residual)
    v1, wg, w1, v2, w2 = (contiguous_rows(t) for t in (v1, wg, w1, v2, w2))
    bg, b1, b2 = (None if b is None else b.contiguous() for b in (bg, b1, b2))
    h, tile = wg.shape[0], tile or tiles.gated_mlp_tile(m, max(r1, r2), x)
    out = x.new_empty(*x.shape[:-1], n)

    def run(tile: tiles.Tile) -> None:
        tile = one_stage_if_unaligned(tile, wg, w1, v2)
        grid, hidden_per_program, partial = split_hidden(x, m, h, r2, tile)
        full = h % tile.BLOCK_N == 0 and (r1, r2) == (tiles.padded(r1), tiles.padded(r2))
        launch(
            gated_mlp_kernel, grid, x,
            None if two_launches else flat, v1, wg, bg, w1, b1, v2, w2, b2, residual, out,
            middle, partial, epsilon, m, k, h, n, r1, r2,
            flat.stride(0), v1.stride(0), wg.stride(0), w1.stride(0), v2.stride(0), w2.stride(0),
            stride(residual), hidden_per_program,
            ACTIVATION=activation, BLOCK_R1=tiles.padded(r1), BLOCK_R2=tiles.padded(r2),
            PRECISION=tiles.precision(x), FULL=full, **tile.arguments(),
        )  # fmt: skip
        if partial is not None:
            expand_splits(partial, w2, b2, residual, out, None)

    run(tiles.best(tile, ("gated_mlp", m, k, h, n, r1, r2), x, run))
    return out


def gated_project(
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    activation: str | None,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """act(x Wgᵀ + bg) * (x W1ᵀ + b1): x (..., k), Wg and W1 (hidden, k) → (..., hidden)."""
    flat, wg, w1 = as_matrix(x), contiguous_rows(wg), contiguous_rows(w1)
    bg, b1 = (None if b is None else b.contiguous() for b in (bg, b1))
    (m, k), h = flat.shape, wg.shape[0]
    out = x.new_empty(*x.shape[:-1], h)
    tile = one_stage_if_unaligned(tile or tiles.pair_tile(m, 2 * h, x), flat, wg, w1)
    launch(
        gated_project_kernel, (triton.cdiv(m, tile.BLOCK_M), triton.cdiv(h, tile.BLOCK_N)), x,
        flat, wg, bg, w1, b1, out, m, k, h, flat.stride(0), wg.stride(0), w1.stride(0),
        ACTIVATION=activation, PRECISION=tiles.precision(x), **tile.arguments(),
    )  # fmt: skip
    return out
