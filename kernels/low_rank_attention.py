"""low_rank_attention: concat_h[softmax(q_h k_hᵀ · scale + mask) v_h] Woᵀ + bo, and its gradients.

For inference the layer norm of x may take the place of x, and a residual is added to the output.

There are three launches: the projections of all heads, attention over the head ranks (online
softmax; the logits are never written), and the output projection. A single kernel would save the
traffic of q, k and v, but every tile of queries needs the keys and values of all tokens. Either
each tile projects them again, which is 13 times the work at 197 tokens and 16 queries a program. Or
one program takes a whole head: then DeiT-S has 6 programs an image for 132 multiprocessors, and
reads x once for each head at batch 64.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels import tiles
from adacomcat.kernels.blocks import (
    load_mn_major,
    load_row,
    load_tile,
    reads_rhs_from_shared,
    store_tile,
)
from adacomcat.kernels.launch import launch
from adacomcat.kernels.layer_norm import layer_norm
from adacomcat.kernels.logits import exponents, finite_maximum, masked_logits
from adacomcat.kernels.matmul import matmul_sum, project
from adacomcat.kernels.reductions import row_sum, weight_grad

Gradient = Tensor | None


@triton.jit
def batch_and_head(HEADS):
    """The image (int64) and the head of this program."""
    return (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS


@triton.jit
def head_offset(batch, head, N, stride, RANK: tl.constexpr):
    """Where the rows of one head begin in a tensor (batch, N, heads * RANK) of that row stride."""
    return batch * N * stride + head * RANK


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, context_ptr, N, HEADS, scale,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, bias_ptr, stride_qk, stride_v,
    IS_BOOL: tl.constexpr, RANK_QK: tl.constexpr, RANK_VO: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_VO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """context = softmax((q + bias) kᵀ · scale + mask) v for BLOCK_M queries of one head.

    The softmax is online: it rescales its sums whenever a tile of keys raises the maximum.
    """
    batch, head = batch_and_head(HEADS)
    stride_vo = HEADS * RANK_VO
    at_qk = head_offset(batch, head, N, stride_qk, RANK_QK)
    at_v = head_offset(batch, head, N, stride_v, RANK_VO)
    at_vo = head_offset(batch, head, N, stride_vo, RANK_VO)
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
    transpose: tl.constexpr = reads_rhs_from_shared(PRECISION, BLOCK_M)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr + at_qk, stride_qk, keys, ranks_qk, N, RANK_QK)
        v = load_mn_major(v_ptr + at_v, stride_v, keys, ranks_vo, N, RANK_VO, transpose)
        logits = masked_logits(
            q, k, scale, mask_ptr, stride_mask_q, stride_mask_k, queries, keys, N,
            IS_BOOL, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(maximum, tl.max(logits, 1))
        base = finite_maximum(higher)
        p = tl.exp2(exponents(logits, base[:, None], mask_ptr, IS_BOOL))
        shrink = tl.exp2(exponents(maximum, base, mask_ptr, IS_BOOL))
        total = total * shrink + tl.sum(p, 1)
        context = tl.dot(
            p.to(v.dtype), v, context * shrink[:, None], input_precision=PRECISION
        )
        maximum = higher
    context = context / tl.where(total == 0.0, 1.0, total)[:, None]
    store_tile(context_ptr + at_vo, stride_vo, queries, ranks_vo, N, RANK_VO, context)


@triton.jit
def attention_queries_backward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, context_ptr, dcontext_ptr, dq_ptr,
    maximum_ptr, lse_ptr, delta_ptr, N, HEADS, scale,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    IS_BOOL: tl.constexpr, RANK_QK: tl.constexpr, RANK_VO: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_VO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, and three numbers a query that the keys' kernel needs.

    These are the maximum, lse = log2 Σ_keys exp(logits - maximum) and delta = Σ_ranks context *
    dcontext. The sum of the first two would lose lse beside a large maximum.
    """
    batch, head = batch_and_head(HEADS)
    stride_qk, stride_vo = HEADS * RANK_QK, HEADS * RANK_VO
    at_qk = head_offset(batch, head, N, stride_qk, RANK_QK)
    at_vo = head_offset(batch, head, N, stride_vo, RANK_VO)
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
        logits = masked_logits(
            q, k, scale, mask_ptr, stride_mask_q, stride_mask_k, queries, keys, N,
            IS_BOOL, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(maximum, tl.max(logits, 1))
        base = finite_maximum(higher)
        total *= tl.exp2(exponents(maximum, base, mask_ptr, IS_BOOL))
        total += tl.sum(tl.exp2(exponents(logits, base[:, None], mask_ptr, IS_BOOL)), 1)
        maximum = higher
    maximum = finite_maximum(maximum)
    # A row that is masked entirely gets +inf, so that p = 2^(exponent - lse) is 0 as before.
    lse = tl.where(total == 0.0, float("inf"), tl.log2(total))
    context = load_tile(context_ptr + at_vo, stride_vo, queries, ranks_vo, N, RANK_VO)
    dcontext = load_tile(dcontext_ptr + at_vo, stride_vo, queries, ranks_vo, N, RANK_VO)
    delta = tl.sum(context.to(tl.float32) * dcontext.to(tl.float32), 1)
    row = tl.program_id(1).to(tl.int64) * N + queries
    tl.store(maximum_ptr + row, maximum, mask=queries < N)
    tl.store(lse_ptr + row, lse, mask=queries < N)
    tl.store(delta_ptr + row, delta, mask=queries < N)
    dq = tl.zeros((BLOCK_M, BLOCK_QK), tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr + at_qk, stride_qk, keys, ranks_qk, N, RANK_QK)
        v = load_tile(v_ptr + at_vo, stride_vo, keys, ranks_vo, N, RANK_VO)
        logits = masked_logits(
            q, k, scale, mask_ptr, stride_mask_q, stride_mask_k, queries, keys, N,
            IS_BOOL, PRECISION,
        )  # fmt: skip
        p = tl.exp2(exponents(logits, maximum[:, None], mask_ptr, IS_BOOL) - lse[:, None])
        dp = tl.dot(dcontext, tl.trans(v), input_precision=PRECISION)
        dlogits = p * (dp - delta[:, None])  # pyright: ignore[reportArgumentType]
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision=PRECISION)
    store_tile(dq_ptr + at_qk, stride_qk, queries, ranks_qk, N, RANK_QK, dq * scale)


@triton.jit
def attention_keys_backward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, dcontext_ptr, maximum_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    N, HEADS, scale, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    IS_BOOL: tl.constexpr, RANK_QK: tl.constexpr, RANK_VO: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_VO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_M keys.

    Logits and p are (keys, queries) here, so that pᵀ dcontext needs no transposition.
    """
    batch, head = batch_and_head(HEADS)
    stride_qk, stride_vo = HEADS * RANK_QK, HEADS * RANK_VO
    at_qk = head_offset(batch, head, N, stride_qk, RANK_QK)
    at_vo = head_offset(batch, head, N, stride_vo, RANK_VO)
    maximum_ptr += tl.program_id(1).to(tl.int64) * N
    lse_ptr += tl.program_id(1).to(tl.int64) * N
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
        maximum = tl.load(maximum_ptr + queries, mask=queries < N, other=0.0)
        lse = tl.load(lse_ptr + queries, mask=queries < N, other=float("inf"))
        delta = tl.load(delta_ptr + queries, mask=queries < N, other=0.0)
        logits = masked_logits(
            k, q, scale, mask_ptr, stride_mask_k, stride_mask_q, keys, queries, N,
            IS_BOOL, PRECISION,
        )  # fmt: skip
        p = tl.exp2(exponents(logits, maximum[None, :], mask_ptr, IS_BOOL) - lse[None, :])
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
    """y = concat_h[softmax(q_h k_hᵀ · scale + mask) v_h] Woᵀ + bo + residual; q, k, v, context.

    Args:
        x, residual: (batch, tokens, dim).
        wq, wk, bq: (heads * rank_qk, dim) twice, and (heads * rank_qk,).
        wv, wo, bo: (heads * rank_vo, dim), (dim, heads * rank_vo), (dim,).
        attn_mask: additive, or bool with True where a query may attend; it is broadcast to
            (batch, heads, tokens, tokens).
        keep_intermediates: `backward` needs the contiguous q, k and v that this gives.
        epsilon: if given, the layer norm of x takes the place of x. It is a launch of its own,
            since each tile of the projections' columns would compute it again.
    """
    if epsilon is not None:
        x = layer_norm(x, epsilon)
    joint = None if keep_intermediates or x.element_size() > 2 else joined(wq, wk, wv)
    if joint is None:
        q, k, v = project(x, bq, wq, wk, wv)
        bq = None
    else:
        # One torch product is faster in 16-bit types. The kernel adds bq, since the product cannot
        # take a bias for q alone.
        q, k, v = F.linear(x, joint).split([w.shape[0] for w in (wq, wk, wv)], -1)
    context = attend(q, k, v, bq, num_heads, scale, attn_mask, tile)
    (out,) = project(context, bo, wo, residual=residual)
    return out, q, k, v, context


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    num_heads: int,
    scale: float,
    attn_mask: Tensor | None,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """softmax((q_h + bias_h) k_hᵀ · scale + mask) v_h of all heads, beside each other.

    Args:
        q, k: (batch, tokens, heads * rank_qk), of one row stride; bias: (heads * rank_qk,).
        v: (batch, tokens, heads * rank_vo).
    """
    context = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    heads = _Heads(q, v, num_heads, scale, attn_mask)

    def run(tile: tiles.Tile) -> None:
        heads.launch(
            attention_kernel, tile, q, k, v, heads.mask, context,
            bias_ptr=None if bias is None else bias.contiguous(),
            stride_qk=q.stride(1), stride_v=v.stride(1), **tiles.registers(tile),
        )  # fmt: skip

    tile = tile or heads.tile()
    run(tiles.best(tile, ("low_rank_attention", *q.shape, *v.shape, num_heads), q, run))
    return context


def joined(*weights: Tensor) -> Tensor | None:
    """The weights as one matrix, as a view, if they lie one after the other in one storage.

    One product with the joint matrix wastes fewer partial tiles than one product a weight.
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
    """The gradients of x, Wq, bq, Wk, Wv, Wo and bo; None where `needs` is False.

    Args:
        grad: the gradient of y, (batch, tokens, dim).
        q, k, v, context: from `forward` with `keep_intermediates`.

    The logits are computed again tile by tile.
    """
    need_x, need_wq, need_bq, need_wk, need_wv, need_wo, need_bo = needs
    dx = dwq = dbq = dwk = dwv = None
    if need_x or need_wq or need_bq or need_wk or need_wv:
        dcontext = matmul_sum((grad, wo))
        heads = _Heads(q, v, num_heads, scale, attn_mask)
        dq, dk, dv = _attention_backward(heads, q, k, v, context, dcontext, tile)
        dx = matmul_sum((dq, wq), (dk, wk), (dv, wv)) if need_x else None
        dwq = weight_grad(dq, x) if need_wq else None
        dbq = row_sum(dq) if need_bq else None
        dwk = weight_grad(dk, x) if need_wk else None
        dwv = weight_grad(dv, x) if need_wv else None
    dwo = weight_grad(grad, context) if need_wo else None
    return dx, dwq, dbq, dwk, dwv, dwo, row_sum(grad) if need_bo else None


def _attention_backward(
    heads: "_Heads",
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Tensor,
    dcontext: Tensor,
    tile: tiles.Tile | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv from the gradient of the context, (batch, tokens, heads * rank_vo)."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    size = q.shape[0], heads.num_heads, q.shape[1]
    of_queries = [q.new_empty(*size, dtype=torch.float32) for _ in range(3)]
    tile = tile or heads.tile()
    heads.launch(
        attention_queries_backward_kernel, tile,
        q, k, v, heads.mask, context, dcontext, dq, *of_queries,
    )  # fmt: skip
    # This kernel accumulates dk and dv at once, and spills unless it takes half as many queries.
    keys_tile = replace(tile, BLOCK_N=max(16, tile.BLOCK_N // 2))
    heads.launch(
        attention_keys_backward_kernel, keys_tile,
        q, k, v, heads.mask, dcontext, *of_queries, dk, dv,
    )  # fmt: skip
    return dq, dk, dv


class _Heads:
    """The grid, strides, ranks and mask that all kernels over the head ranks take."""

    def __init__(
        self, q: Tensor, v: Tensor, num_heads: int, scale: float, attn_mask: Tensor | None
    ) -> None:
        self.like, self.num_heads, self.scale = q, num_heads, scale
        self.batch, self.tokens = q.shape[:2]
        self.rank_qk, self.rank_vo = q.shape[2] // num_heads, v.shape[2] // num_heads
        self.mask, self.is_bool = attn_mask, False
        if attn_mask is not None:
            self.is_bool = attn_mask.dtype == torch.bool
            # `expand` broadcasts by a stride of zero and copies nothing.
            mask = attn_mask.view(torch.uint8) if self.is_bool else attn_mask
            self.mask = mask.expand(self.batch, num_heads, self.tokens, self.tokens)

    def tile(self) -> tiles.Tile:
        rank = max(self.rank_qk, self.rank_vo)
        return tiles.attention_tile(self.tokens, self.batch * self.num_heads, rank, self.like)

    def launch(self, kernel: Any, tile: tiles.Tile, *tensors: Tensor | None,
               **options: object) -> None:
        """Launch one program for each tile of tokens, image and head."""
        grid = (triton.cdiv(self.tokens, tile.BLOCK_M), self.batch * self.num_heads)
        strides = (0, 0, 0, 0) if self.mask is None else self.mask.stride()
        launch(
            kernel, grid, self.like, *tensors, self.tokens, self.num_heads, self.scale, *strides,
            IS_BOOL=self.is_bool, RANK_QK=self.rank_qk, RANK_VO=self.rank_vo,
            BLOCK_QK=tiles.padded(self.rank_qk), BLOCK_VO=tiles.padded(self.rank_vo),
            PRECISION=tiles.precision(self.like), **tile.arguments(without="BLOCK_K"), **options,
        )  # fmt: skip
