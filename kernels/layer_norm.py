"""Layer norm without weight and bias, which `optimize` folds into the projection that follows."""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels.blocks import load_tile, row_block, store_tile
from adacomcat.kernels.launch import as_matrix, launch

# One program keeps whole rows in registers; torch's kernel takes longer rows.
LONGEST_ROW = 8192
ELEMENTS = 4096  # of a tile: 32 for each of 128 threads


@triton.jit
def layer_norm_kernel(
    x_ptr, y_ptr, M, K, stride_x, epsilon, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """y = (x - mean) / sqrt(variance + epsilon) for BLOCK_M whole rows; K ≤ BLOCK_K."""
    first, remaining = row_block(M, BLOCK_M)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    x = load_tile(x_ptr + first * stride_x, stride_x, rows, columns, remaining, K).to(tl.float32)
    mean = tl.sum(x, 1) / K
    x = tl.where(columns[None, :] < K, x - mean[:, None], 0.0)
    variance = tl.sum(x * x, 1) / K
    y = x * tl.rsqrt(variance + epsilon)[:, None]
    store_tile(y_ptr + first * K, K, rows, columns, remaining, K, y)


def layer_norm(x: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) over the last dimension: x (..., k) → (..., k)."""
    flat = as_matrix(x)
    m, k = flat.shape
    if not 0 < k <= LONGEST_ROW:
        return F.layer_norm(x, (k,), eps=epsilon)
    out = x.new_empty(x.shape)
    width = max(16, triton.next_power_of_2(k))
    block = max(1, ELEMENTS // width)
    # Fused multiply-adds in the sum over lanes would round differently in each lane. Which lane
    # stores the variance is undefined, so the last bits would be too (tests/gpu/ptx reports it).
    launch(
        layer_norm_kernel, (triton.cdiv(m, block),), x,
        flat, out, m, k, flat.stride(0), epsilon, BLOCK_M=block, BLOCK_K=width, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
