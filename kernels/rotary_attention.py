"""rotary_attention: concat_h[softmax(R q_h (R k_h)ᵀ · scale + mask) v_h] Woᵀ + bo, for inference.

q = (x Vq) Wqᵀ + bq and k = (x Vk) Wkᵀ + bk; R turns each pair of elements by the position of its
token. Without Vq or Vk that projection is dense. The layer norm of x may take the place of x, and a
residual is added to the output.

The rotation stands behind the projection, in its registers: each program computes both elements of
its pairs, as two products with the same x, adds the biases, turns the pairs, and stores them once.
In the attention itself, every tile of queries would turn all keys again. In memory all first
elements of a head's pairs come before the second ones; queries and keys have the same order, so
their products stay.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels import tiles
from adacomcat.kernels.blocks import row_block, store_tile
from adacomcat.kernels.launch import as_matrix, contiguous_rows, launch, one_stage_if_unaligned
from adacomcat.kernels.layer_norm import layer_norm
from adacomcat.kernels.low_rank_attention import attend
from adacomcat.kernels.matmul import matmul, project, two_products


@triton.jit
def load_pairs(
    ptr, rows, inside, start, other,
    HALF: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Both elements of BLOCK_N pairs from `start` on, (rows, BLOCK_N) each in float32.

    Args:
        rows: offsets of rows of 2 COUNT elements from `ptr`; those not `inside` give `other`.
        HALF: whether elements j and j + COUNT are a pair, else 2 j and 2 j + 1.
    """
    if HALF:
        pairs = start + tl.arange(0, BLOCK_N)
        ptrs = ptr + rows[:, None] + pairs[None, :]
        mask = inside[:, None] & (pairs[None, :] < COUNT)
        first = tl.load(ptrs, mask=mask, other=other)
        second = tl.load(ptrs + COUNT, mask=mask, other=other)
    else:
        columns = 2 * start + tl.arange(0, 2 * BLOCK_N)
        ptrs = ptr + rows[:, None] + columns[None, :]
        both = tl.load(ptrs, mask=inside[:, None] & (columns[None, :] < 2 * COUNT), other=other)
        first, second = tl.split(tl.reshape(both, (both.shape[0], BLOCK_N, 2)))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def rotary_project_kernel(
    xq_ptr, xk_ptr, wq_ptr, wk_ptr, bq_ptr, bk_ptr, sin_ptr, cos_ptr, q_ptr, k_ptr,
    M, N, PREFIX, KQ, KK, HEADS, stride_xq, stride_xk, stride_wq, stride_wk,
    stride_angle_b, stride_angle_h, stride_angle_n,
    HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q = R (xq Wqᵀ + bq) and k = R (xk Wkᵀ + bk), for BLOCK_N pairs of one head.

    xq and xk are (M, KQ) and (M, KK), M being whole images of N tokens, of which the first PREFIX
    do not turn. q and k are (M, HEADS * 2 PAIRS); all first elements of a head's pairs come first.
    """
    blocks: tl.constexpr = (PAIRS + BLOCK_N - 1) // BLOCK_N
    head, start = tl.program_id(1) // blocks, tl.program_id(1) % blocks * BLOCK_N
    x_ptr, w_ptr, y_ptr, K, stride_x, stride_w = xq_ptr, wq_ptr, q_ptr, KQ, stride_xq, stride_wq
    bias_ptr = bq_ptr
    if head >= HEADS:
        x_ptr, w_ptr, y_ptr, K, stride_x, stride_w = xk_ptr, wk_ptr, k_ptr, KK, stride_xk, stride_wk
        bias_ptr = bk_ptr
        head -= HEADS
    apart: tl.constexpr = PAIRS if HALF else 1  # the elements of a pair
    step: tl.constexpr = 1 if HALF else 2  # from one pair to the next
    first, remaining = row_block(M, BLOCK_M)
    rows, pairs = tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    w_ptr += head.to(tl.int64) * 2 * PAIRS * stride_w
    a, b = two_products(
        x_ptr + first * stride_x, stride_x, w_ptr, step * stride_w, w_ptr + apart * stride_w,
        step * stride_w, pairs, remaining, PAIRS, K, BLOCK_M, BLOCK_K, PRECISION,
    )  # fmt: skip
    if bias_ptr is not None:
        bias_ptr += head * 2 * PAIRS + step * pairs
        inside = pairs < PAIRS
        a += tl.load(bias_ptr, mask=inside, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias_ptr + apart, mask=inside, other=0.0).to(tl.float32)[None, :]
    token = (first + rows) % N - PREFIX
    turns = (token >= 0) & (rows < remaining)
    at = (first + rows) // N * stride_angle_b + head * stride_angle_h + token * stride_angle_n
    sin_a, sin_b = load_pairs(sin_ptr, at, turns, start, 0.0, HALF, PAIRS, BLOCK_N)
    cos_a, cos_b = load_pairs(cos_ptr, at, turns, start, 1.0, HALF, PAIRS, BLOCK_N)
    stride_y = HEADS * 2 * PAIRS
    y_ptr += first * stride_y + head * 2 * PAIRS
    store_tile(y_ptr, stride_y, rows, pairs, remaining, PAIRS, a * cos_a - b * sin_a)
    y_ptr += PAIRS
    store_tile(y_ptr, stride_y, rows, pairs, remaining, PAIRS, b * cos_b + a * sin_b)


def forward(
    x: Tensor,
    vq: Tensor | None,
    wq: Tensor,
    bq: Tensor | None,
    vk: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    num_heads: int,
    scale: float,
    sin: Tensor | None,
    cos: Tensor | None,
    half: bool,
    attn_mask: Tensor | None = None,
    tile: tiles.Tile | None = None,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = concat_h[softmax(R q_h (R k_h)ᵀ · scale + mask) v_h] Woᵀ + bo + residual.

    Args:
        x, residual: (batch, tokens, dim).
        vq, wq, bq: (dim, rank) or None, (heads * head_dim, rank or dim), (heads * head_dim,).
        vk, wk, bk: the same of the keys.
        wv, wo, bo: (heads * rank_vo, dim), (dim, heads * rank_vo), (dim,).
        sin, cos: broadcast to (batch, heads, turning tokens, head_dim); None where nothing turns.
        half: whether elements j and j + head_dim / 2 turn together, else 2 j and 2 j + 1.
        attn_mask: as in low_rank_attention.
        epsilon: if given, the layer norm of x takes the place of x.
    """
    x = x if epsilon is None else layer_norm(x, epsilon)
    xq, xk = (x if v is None else matmul(x, contiguous_rows(v)) for v in (vq, vk))
    # A plain product: torch's is faster in 16-bit types.
    v = F.linear(x, wv) if x.element_size() == 2 else project(x, None, wv)[0]
    if sin is None or cos is None or not sin.numel():
        (q,), (k,) = project(xq, bq, wq), project(xk, bk, wk)
    else:
        q, k = rotary_project(xq, wq, bq, xk, wk, bk, num_heads, sin, cos, half)
    context = attend(q, k, v, None, num_heads, scale, attn_mask, tile)
    return project(context, bo, wo, residual=residual)[0]


def rotary_project(
    xq: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    xk: Tensor,
    wk: Tensor,
    bk: Tensor | None,
    num_heads: int,
    sin: Tensor,
    cos: Tensor,
    half: bool,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """R (xq Wqᵀ + bq) and R (xk Wkᵀ + bk), (batch, tokens, heads * head_dim) each.

    Each head has the first elements of all its pairs, then the second ones.
    """
    batch, tokens, width = *xq.shape[:2], wq.shape[0]
    flat_q, flat_k, wq, wk = as_matrix(xq), as_matrix(xk), contiguous_rows(wq), contiguous_rows(wk)
    if bq is not None or bk is not None:
        bq, bk = (wq.new_zeros(width) if b is None else b.contiguous() for b in (bq, bk))
    q, k = (xq.new_empty(batch, tokens, width) for _ in range(2))
    if sin.stride() != cos.stride() or sin.stride(-1) != 1:
        sin, cos = sin.contiguous(), cos.contiguous()
    prefix, pairs = tokens - sin.shape[-2], width // num_heads // 2
    # `expand` broadcasts by strides of zero.
    strides = sin.expand(batch, num_heads, *sin.shape[-2:]).stride()[:3]
    m = batch * tokens
    tile = tile or tiles.pair_tile(m, 2 * width, xq, widest=pairs)
    tile = one_stage_if_unaligned(tile, flat_q, flat_k, wq, wk)
    programs = 2 * num_heads * triton.cdiv(pairs, tile.BLOCK_N)
    launch(
        rotary_project_kernel, (triton.cdiv(m, tile.BLOCK_M), programs), xq,
        flat_q, flat_k, wq, wk, bq, bk, sin, cos, q, k,
        m, tokens, prefix, flat_q.shape[1], flat_k.shape[1], num_heads,
        flat_q.stride(0), flat_k.stride(0), wq.stride(0), wk.stride(0), *strides,
        HALF=half, PAIRS=pairs, PRECISION=tiles.precision(xq), **tile.arguments(),
        **tiles.registers(tile, blocks=1, always=True),
    )  # fmt: skip
    return q, k
