"""Layer norm without weight and bias, which are folded into the projection that follows."""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels.blocks import load_tile, store_tile
from adacomcat.kernels.launch import launch, rows

# A row lies in the registers of one program; longer ones are left to the library.
LONGEST_ROW = 8192
ELEMENTS = 4096  # of a tile: 32 for each of 128 threads


@triton.jit
def normalize_kernel(
    x_ptr, y_ptr, M, K, stride_x, epsilon, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """y = (x - mean) / sqrt(variance + epsilon) of BLOCK_M whole rows, K ≤ BLOCK_K."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    left = (M - first).to(tl.int32)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    x = load_tile(x_ptr + first * stride_x, stride_x, rows, columns, left, K).to(tl.float32)
    mean = tl.sum(x, 1) / K
    x = tl.where(columns[None, :] < K, x - mean[:, None], 0.0)
    variance = tl.sum(x * x, 1) / K
    y = x * tl.rsqrt(variance + epsilon)[:, None]
    store_tile(y_ptr + first * K, K, rows, columns, left, K, y)


def normalize(x: Tensor, epsilon: float) -> Tensor:
    """The layer norm of x (..., k) over its last dimension."""
    flat = rows(x)
    m, k = flat.shape
    if not 0 < k <= LONGEST_ROW:
        return F.layer_norm(x, (k,), eps=epsilon)
    out = x.new_empty(x.shape)
    width = max(16, triton.next_power_of_2(k))
    block = max(1, ELEMENTS // width)
    # Squares fused into the sums across lanes would leave each lane a sum of its own last bits, and
    # the result to chance (the race check finds it).
    launch(
        normalize_kernel, (triton.cdiv(m, block),), x,
        flat, out, m, k, flat.stride(0), epsilon, BLOCK_M=block, BLOCK_K=width, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
