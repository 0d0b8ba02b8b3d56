"""The second launch of a split-k low-rank MLP: y = (Σ_splits partial) Uᵀ + b + residual."""

import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels import tiles
from adacomcat.kernels.blocks import expand, load_tile, row_block, store_tile
from adacomcat.kernels.launch import launch, stride


@triton.jit
def expand_splits_kernel(
    partial_ptr, u_ptr, bias_ptr, residual_ptr, y_ptr, middle_ptr,
    M, N, R, SPLITS, stride_split, stride_u, stride_residual, columns_per_program,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = middle Uᵀ + b + residual; middle is the sum of the SPLITS of `partial` (SPLITS, M, R)."""
    first, remaining = row_block(M, BLOCK_M)
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    middle = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    partial_ptr += first * R
    for _ in range(SPLITS):
        middle += load_tile(partial_ptr, R, rows, ranks, remaining, R)
        partial_ptr += stride_split
    if middle_ptr is not None:
        # The first of the programs that share these rows stores them.
        stored = tl.where(tl.program_id(1) == 0, remaining, 0)
        store_tile(middle_ptr + first * R, R, rows, ranks, stored, R, middle)
    if residual_ptr is not None:
        residual_ptr += first * stride_residual
    begin = tl.program_id(1) * columns_per_program
    expand(
        middle.to(y_ptr.dtype.element_ty), u_ptr, stride_u, bias_ptr,
        residual_ptr, stride_residual, y_ptr + first * N, remaining, N, R,
        begin, tl.minimum(begin + columns_per_program, N),
        BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip


def expand_splits(
    partial: Tensor,
    u: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    middle: Tensor | None,
    tile: tiles.Tile | None = None,
) -> None:
    """Store out = middle Uᵀ + b + residual, with middle = Σ_splits partial, and middle if given.

    Args:
        partial: (splits, m, r) in float32.
        u, bias, residual: (n, r), (n,), (m, n).
        out, middle: m rows of n and of r.

    Every program reads all splits of its rows, hence a small `least`.
    """
    (splits, m, r), n = partial.shape, u.shape[0]
    tile = tile or tiles.row_tile(m, r, out, least=16)
    blocks = triton.cdiv(m, tile.BLOCK_M)
    columns = tiles.columns_per_program(n, tile.BLOCK_N, blocks)
    launch(
        expand_splits_kernel, (blocks, triton.cdiv(n, columns)), partial,
        partial, u, bias, residual, out, middle,
        m, n, r, splits, partial.stride(0), u.stride(0), stride(residual), columns,
        BLOCK_R=tiles.padded(r), PRECISION=tiles.precision(out),
        **tile.arguments(without="BLOCK_K"),
    )  # fmt: skip
