"""low_rank_attention: concat_h[softmax(q_h k_hᵀ · scale + mask) v_h] Woᵀ + bo, and its gradients.

For inference x may be its layer norm, and the output gets a residual.

Three launches: the projections of all heads as one product, attention over the head ranks without
ever writing the logits, and the output projection. One kernel for all of it would be smaller in
traffic by q, k and v, but it has no shape to be chosen for: each tile of queries needs the keys
and values of all tokens, so either every tile projects them again (at 197 tokens and 16 queries a
program 13 times the work), or one program takes a whole head, which is 6 programs for an image of
DeiT-S on 132 multiprocessors, and at batch 64 reads x once for each head.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels import tiles
from adacomcat.kernels.blocks import (
    is_shared,
    load_row,
    load_tile,
    load_transposed,
    store_tile,
)
from adacomcat.kernels.launching import launch
from adacomcat.kernels.normalization import normalize
from adacomcat.kernels.products import gather, project
from adacomcat.kernels.reductions import row_sum, weight_grad

Gradient = Tensor | None
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def masked_logits(
    logits, mask_ptr, stride_mask_q, stride_mask_k, queries, keys, N, IS_BOOL: tl.constexpr
):
    """logits in base 2 with the mask applied, -inf for keys past the end; (queries, keys)."""
    inside = keys[None, :] < N
    if mask_ptr is not None:
        ptrs = mask_ptr + queries[:, None] * stride_mask_q + keys[None, :] * stride_mask_k
        mask = tl.load(ptrs, mask=(queries[:, None] < N) & inside, other=0)
        if IS_BOOL:
            inside = inside & (mask != 0)
        else:
            logits += mask.to(tl.float32) * LOG2_E
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def finite(maximum):
    """The maximum of a row, or 0 where all of the row is masked: -inf minus -inf is no number."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, context_ptr, N, HEADS, scale,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, bias_ptr, stride_qk, stride_v,
    IS_BOOL: tl.constexpr, RANK_QK: tl.constexpr, RANK_VO: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_VO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax((q + bias) kᵀ · scale + mask) v for BLOCK_M queries of a head, online, in base 2."""
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    stride_vo = HEADS * RANK_VO
    at_qk = batch * N * stride_qk + head * RANK_QK
    at_v = batch * N * stride_v + head * RANK_VO
    at_vo = batch * N * stride_vo + head * RANK_VO
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask_b + head * stride_mask_h
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks_qk, ranks_vo = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_VO)
    q = load_tile(q_ptr + at_qk, stride_qk, queries, ranks_qk, N, RANK_QK)
    if bias_ptr is not None:
        bias = load_row(bias_ptr + head * RANK_QK, ranks_qk, RANK_QK)
        q = (q.to(tl.float32) + bias[None, :]).to(q.dtype)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, BLOCK_VO), tl.float32)
    shared: tl.constexpr = is_shared(PRECISION, BLOCK_M)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr + at_qk, stride_qk, keys, ranks_qk, N, RANK_QK)
        v = load_transposed(v_ptr + at_v, stride_v, keys, ranks_vo, N, RANK_VO, shared)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        logits = masked_logits(
            logits, mask_ptr, stride_mask_q, stride_mask_k, queries, keys, N, IS_BOOL
        )
        higher = tl.maximum(maximum, tl.max(logits, 1))
        base = finite(higher)
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink + tl.sum(p, 1)
        context = tl.dot(
            p.to(v.dtype), v, context * shrink[:, None], input_precision=PRECISION
        )
        maximum = higher
    context = context / tl.where(total == 0.0, 1.0, total)[:, None]
    store_tile(context_ptr + at_vo, stride_vo, queries, ranks_vo, N, RANK_VO, context)


@triton.jit
def attention_queries_backward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, context_ptr, dcontext_ptr, dq_ptr, log_ptr, delta_ptr,
    N, HEADS, scale, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    IS_BOOL: tl.constexpr, RANK_QK: tl.constexpr, RANK_VO: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_VO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, and for the keys' kernel log2 Σ 2^logits and Σ context * dcontext."""
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    stride_qk, stride_vo = HEADS * RANK_QK, HEADS * RANK_VO
    at_qk = batch * N * stride_qk + head * RANK_QK
    at_vo = batch * N * stride_vo + head * RANK_VO
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask_b + head * stride_mask_h
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks_qk, ranks_vo = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_VO)
    q = load_tile(q_ptr + at_qk, stride_qk, queries, ranks_qk, N, RANK_QK)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr + at_qk, stride_qk, keys, ranks_qk, N, RANK_QK)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        logits = masked_logits(
            logits, mask_ptr, stride_mask_q, stride_mask_k, queries, keys, N, IS_BOOL
        )
        higher = tl.maximum(maximum, tl.max(logits, 1))
        base = finite(higher)
        total = total * tl.exp2(maximum - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        maximum = higher
    # Where all of a row is masked, +inf: 2^(logits - log) is then 0, as in the forward pass.
    log = tl.where(total == 0.0, float("inf"), finite(maximum) + tl.log2(total))
    context = load_tile(context_ptr + at_vo, stride_vo, queries, ranks_vo, N, RANK_VO)
    dcontext = load_tile(dcontext_ptr + at_vo, stride_vo, queries, ranks_vo, N, RANK_VO)
    delta = tl.sum(context.to(tl.float32) * dcontext.to(tl.float32), 1)
    row = tl.program_id(1).to(tl.int64) * N + queries
    tl.store(log_ptr + row, log, mask=queries < N)
    tl.store(delta_ptr + row, delta, mask=queries < N)
    dq = tl.zeros((BLOCK_M, BLOCK_QK), tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr + at_qk, stride_qk, keys, ranks_qk, N, RANK_QK)
        v = load_tile(v_ptr + at_vo, stride_vo, keys, ranks_vo, N, RANK_VO)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        logits = masked_logits(
            logits, mask_ptr, stride_mask_q, stride_mask_k, queries, keys, N, IS_BOOL
        )
        p = tl.exp2(logits - log[:, None])
        dp = tl.dot(dcontext, tl.trans(v), input_precision=PRECISION)
        dlogits = p * (dp - delta[:, None])
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=PRECISION)
    store_tile(dq_ptr + at_qk, stride_qk, queries, ranks_qk, N, RANK_QK, dq * scale)


@triton.jit
def attention_keys_backward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, dcontext_ptr, log_ptr, delta_ptr, dk_ptr, dv_ptr,
    N, HEADS, scale, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    IS_BOOL: tl.constexpr, RANK_QK: tl.constexpr, RANK_VO: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_VO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_M keys. Everything is transposed, (keys, queries), so that p is not."""
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    stride_qk, stride_vo = HEADS * RANK_QK, HEADS * RANK_VO
    at_qk = batch * N * stride_qk + head * RANK_QK
    at_vo = batch * N * stride_vo + head * RANK_VO
    log_ptr += tl.program_id(1).to(tl.int64) * N
    delta_ptr += tl.program_id(1).to(tl.int64) * N
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask_b + head * stride_mask_h
    keys = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks_qk, ranks_vo = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_VO)
    k = load_tile(k_ptr + at_qk, stride_qk, keys, ranks_qk, N, RANK_QK)
    v = load_tile(v_ptr + at_vo, stride_vo, keys, ranks_vo, N, RANK_VO)
    dk = tl.zeros((BLOCK_M, BLOCK_QK), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_VO), tl.float32)
    for start in range(0, N, BLOCK_N):
        queries = start + tl.arange(0, BLOCK_N)
        q = load_tile(q_ptr + at_qk, stride_qk, queries, ranks_qk, N, RANK_QK)
        dcontext = load_tile(dcontext_ptr + at_vo, stride_vo, queries, ranks_vo, N, RANK_VO)
        log = tl.load(log_ptr + queries, mask=queries < N, other=float("inf"))
        delta = tl.load(delta_ptr + queries, mask=queries < N, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
        # Rows are keys here, so the strides of the mask change places.
        logits = masked_logits(
            logits, mask_ptr, stride_mask_k, stride_mask_q, keys, queries, N, IS_BOOL
        )
        p = tl.exp2(logits - log[None, :])
        dv = tl.dot(p.to(v.dtype), dcontext, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dcontext), input_precision=PRECISION)
        dlogits = p * (dp - delta[None, :])
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision=PRECISION)
    store_tile(dk_ptr + at_qk, stride_qk, keys, ranks_qk, N, RANK_QK, dk * scale)
    store_tile(dv_ptr + at_vo, stride_vo, keys, ranks_vo, N, RANK_VO, dv)


def forward(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    num_heads: int,
    scale: float,
    attn_mask: Tensor | None = None,
    keep_intermediates: bool = True,
    tile: tiles.Tile | None = None,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, q, k, v and the context; with `keep_intermediates` dense, as gradients want them.

    With an `epsilon` a launch of its own normalizes x first, since each tile of the projections'
    columns would do it again.
    """
    if epsilon is not None:
        x = normalize(x, epsilon)
    joint = None if keep_intermediates or x.element_size() > 2 else joined(wq, wk, wv)
    if joint is None:
        q, k, v = project(x, bq, wq, wk, wv)
        bq = None
    else:
        # One product of 16-bit types is faster in the library, which has no bias for a part of it.
        q, k, v = F.linear(x, joint).split([w.shape[0] for w in (wq, wk, wv)], -1)
    context = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    heads = _Heads(q, v, num_heads, scale, attn_mask)

    def run(tile: tiles.Tile) -> None:
        heads.launch(
            attention_kernel, tile, q, k, v, heads.mask, context,
            bias_ptr=None if bq is None else bq.contiguous(),
            stride_qk=q.stride(1), stride_v=v.stride(1), **tiles.registers(tile),
        )  # fmt: skip

    tile = tile or heads.tile()
    run(tiles.best(tile, ("low_rank_attention", *q.shape, *v.shape, num_heads), x, run))
    (out,) = project(context, bo, wo, residual=residual)
    return out, q, k, v, context


def joined(*weights: Tensor) -> Tensor | None:
    """The matrix of which these are the rows, one after the other, if there is one in memory.

    A product with it has tiles of any columns, one with each has tiles of its own.
    """
    first, storage = weights[0], weights[0].untyped_storage().data_ptr()
    end, width = first.data_ptr(), first.shape[1]
    for w in weights:
        follows = w.data_ptr() == end and w.untyped_storage().data_ptr() == storage
        if not (follows and w.is_contiguous() and w.shape[1] == width):
            return None
        end += w.numel() * w.element_size()
    return first.as_strided((sum(w.shape[0] for w in weights), width), (width, 1))


def backward(
    grad: Tensor,
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    num_heads: int,
    scale: float,
    attn_mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Tensor,
    needs: Sequence[bool],
    tile: tiles.Tile | None = None,
) -> tuple[Gradient, ...]:
    """The gradients of x, Wq, bq, Wk, Wv, Wo and bo; None for those that are not needed.

    Logits are computed again, tile by tile; only two numbers a query and head are stored.
    """
    need_x, need_wq, need_bq, need_wk, need_wv, need_wo, need_bo = needs
    dx = dq = dk = dv = None
    if need_x or need_wq or need_bq or need_wk or need_wv:
        dcontext = gather((grad, wo))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        heads = _Heads(q, v, num_heads, scale, attn_mask)
        log, delta = (
            q.new_empty(q.shape[0], num_heads, q.shape[1], dtype=torch.float32) for _ in range(2)
        )
        tile = tile or heads.tile()
        heads.launch(
            attention_queries_backward_kernel, tile,
            q, k, v, heads.mask, context, dcontext, dq, log, delta,
        )  # fmt: skip
        # Two sums are alive there: half as many queries at a time, or registers spill.
        keys_tile = replace(tile, BLOCK_N=max(16, tile.BLOCK_N // 2))
        heads.launch(
            attention_keys_backward_kernel, keys_tile,
            q, k, v, heads.mask, dcontext, log, delta, dk, dv,
        )  # fmt: skip
    if need_x:
        dx = gather((dq, wq), (dk, wk), (dv, wv))
    return (
        dx,
        weight_grad(dq, x) if need_wq else None,
        row_sum(dq) if need_bq else None,
        weight_grad(dk, x) if need_wk else None,
        weight_grad(dv, x) if need_wv else None,
        weight_grad(grad, context) if need_wo else None,
        row_sum(grad) if need_bo else None,
    )


class _Heads:
    """What the kernels over head ranks have in common: grid, strides, ranks and the mask."""

    def __init__(
        self, q: Tensor, v: Tensor, num_heads: int, scale: float, attn_mask: Tensor | None
    ) -> None:
        self.like, self.num_heads, self.scale = q, num_heads, scale
        self.batch, self.tokens = q.shape[:2]
        self.rank_qk, self.rank_vo = q.shape[2] // num_heads, v.shape[2] // num_heads
        self.mask, self.is_bool = attn_mask, False
        if attn_mask is not None:
            self.is_bool = attn_mask.dtype == torch.bool
            # Broadcasting is a stride of zero: nothing is copied.
            mask = attn_mask.view(torch.uint8) if self.is_bool else attn_mask
            self.mask = mask.expand(self.batch, num_heads, self.tokens, self.tokens)

    def tile(self) -> tiles.Tile:
        rank = max(self.rank_qk, self.rank_vo)
        return tiles.attention_tile(
            self.tokens, self.batch * self.num_heads, rank, self.like
        )

    def launch(
        self, kernel: object, tile: tiles.Tile, *tensors: Tensor | None, **options: int
    ) -> None:
        grid = (triton.cdiv(self.tokens, tile.BLOCK_M), self.batch * self.num_heads)
        strides = (0, 0, 0, 0) if self.mask is None else self.mask.stride()
        launch(
            kernel, grid, self.like, *tensors, self.tokens, self.num_heads, self.scale, *strides,
            IS_BOOL=self.is_bool, RANK_QK=self.rank_qk, RANK_VO=self.rank_vo,
            BLOCK_QK=tiles.padded(self.rank_qk), BLOCK_VO=tiles.padded(self.rank_vo),
            PRECISION=tiles.precision(self.like), **tile.arguments(without="BLOCK_K"), **options,
        )  # fmt: skip
