"""low_rank_mlp: (h V2) U2ᵀ + b2 with h = act((x V1) U1ᵀ + b1), and its gradients.

For inference the layer norm of x may take the place of x, and a residual is added to the output.

One program owns BLOCK_M rows and keeps x V1 in registers. It computes the hidden layer tile by tile
and adds each tile's share to h V2 at once, so the hidden layer, four times as wide as x, is never
written. The gradient of x takes the same path backwards.

Few rows would leave most of the GPU idle. There the hidden units are split over several programs
for the same rows (split-k): each computes x V1 and stores a partial h V2 in float32. A second
kernel adds the splits in a fixed order and expands the sum to the output. The gradient of x is
split the same way. The partial sums have as many bytes as the weights, but they stay in the L2
cache, and each program reads only its share of U1 and V2. If V1 is large, x V1 is a launch of its
own.

A wide rank (`tiles.is_wide`) exceeds the registers; the MLP then runs as two low-rank layers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from adacomcat.kernels import low_rank_linear, tiles
from adacomcat.kernels.activations import activate, activation_grad
from adacomcat.kernels.blocks import (
    contract,
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
from adacomcat.kernels.matmul import matmul, project
from adacomcat.kernels.reductions import hidden_grads, row_sum, weight_grad

Gradient = Tensor | None


@triton.jit
def contract_or_load(
    x_ptr, stride_x, w_ptr, stride_w, epsilon, middle_ptr, first, remaining, K, R,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x W for this block of rows in DTYPE, and stored to `middle_ptr` (M, R) if that is given.

    Without x, an earlier launch has computed x W, and it is loaded from `middle_ptr`.
    """
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    if x_ptr is not None:
        middle = contract(
            x_ptr + first * stride_x, stride_x, w_ptr, stride_w, epsilon, remaining, K, R,
            BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
        )  # fmt: skip
        if middle_ptr is not None:
            # The first of the programs that share these rows stores them.
            stored = tl.where(tl.program_id(1) == 0, remaining, 0)
            store_tile(middle_ptr + first * R, R, rows, ranks, stored, R, middle)
        middle = middle.to(DTYPE)
    else:
        middle = load_tile(middle_ptr + first * R, R, rows, ranks, remaining, R)
    return middle


@triton.jit
def low_rank_mlp_kernel(
    x_ptr, v1_ptr, u1_ptr, b1_ptr, v2_ptr, u2_ptr, b2_ptr, residual_ptr, y_ptr,
    middle1_ptr, middle2_ptr, partial_ptr, epsilon, M, K, H, N, R1, R2,
    stride_x, stride_v1, stride_u1, stride_v2, stride_u2, stride_residual,
    hidden_per_program, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R1: tl.constexpr, BLOCK_R2: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """y = act(x V1 U1ᵀ + b1) V2 U2ᵀ + b2 + residual, and x V1 and h V2 if pointers are given.

    With `partial_ptr` only one split of h V2 is stored, which `expand_splits_kernel` continues.
    Without `x_ptr` x V1 is an input. FULL promises that no tile of U1 or V2 needs a mask.
    """
    dtype: tl.constexpr = u1_ptr.dtype.element_ty
    first, remaining = row_block(M, BLOCK_M)
    rows, ranks1, ranks2 = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R1), tl.arange(0, BLOCK_R2)
    middle1 = contract_or_load(
        x_ptr, stride_x, v1_ptr, stride_v1, epsilon, middle1_ptr, first, remaining, K, R1,
        dtype, BLOCK_M, BLOCK_K, BLOCK_R1, PRECISION,
    )  # fmt: skip
    middle2 = tl.zeros((BLOCK_M, BLOCK_R2), tl.float32)
    begin = tl.program_id(1) * hidden_per_program
    for start in range(begin, tl.minimum(begin + hidden_per_program, H), BLOCK_N):
        hidden = start + tl.arange(0, BLOCK_N)
        u1 = load_tile(u1_ptr, stride_u1, hidden, ranks1, H, R1, FULL)
        h = tl.dot(middle1, tl.trans(u1), input_precision=PRECISION)
        if b1_ptr is not None:
            h += load_row(b1_ptr, hidden, H)[None, :]
        h = activate(h, ACTIVATION, dtype).to(dtype)
        transpose: tl.constexpr = reads_rhs_from_shared(PRECISION, BLOCK_M)
        v2 = load_mn_major(v2_ptr, stride_v2, hidden, ranks2, H, R2, transpose, FULL)
        middle2 = tl.dot(h, v2, middle2, input_precision=PRECISION)
    if partial_ptr is not None:
        partial_ptr += (tl.program_id(1).to(tl.int64) * M + first) * R2
        store_tile(partial_ptr, R2, rows, ranks2, remaining, R2, middle2)
    else:
        if middle2_ptr is not None:
            store_tile(middle2_ptr + first * R2, R2, rows, ranks2, remaining, R2, middle2)
        if residual_ptr is not None:
            residual_ptr += first * stride_residual
        expand(
            middle2.to(dtype), u2_ptr, stride_u2, b2_ptr, residual_ptr, stride_residual,
            y_ptr + first * N, remaining, N, R2, 0, N, BLOCK_M, BLOCK_N, BLOCK_R2, PRECISION,
        )  # fmt: skip


@triton.jit
def low_rank_mlp_backward_kernel(
    grad_ptr, u2_ptr, v2_ptr, middle1_ptr, u1_ptr, b1_ptr, v1_ptr,
    dx_ptr, dmiddle1_ptr, dmiddle2_ptr, partial_ptr,
    M, K, H, N, R1, R2, stride_grad, stride_middle1, stride_v1, stride_u1, stride_v2, stride_u2,
    hidden_per_program, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R1: tl.constexpr, BLOCK_R2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dmiddle2 = grad U2, dmiddle1 = (dmiddle2 V2ᵀ * act'(middle1 U1ᵀ + b1)) U1, dx = dmiddle1 V1ᵀ.

    With `partial_ptr` only one split of dmiddle1 is stored, which `expand_splits_kernel` continues.
    Without `grad_ptr` dmiddle2 is an input.
    """
    dtype: tl.constexpr = u1_ptr.dtype.element_ty
    first, remaining = row_block(M, BLOCK_M)
    rows, ranks1, ranks2 = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R1), tl.arange(0, BLOCK_R2)
    dmiddle2 = contract_or_load(
        grad_ptr, stride_grad, u2_ptr, stride_u2, None, dmiddle2_ptr, first, remaining, N, R2,
        dtype, BLOCK_M, BLOCK_K, BLOCK_R2, PRECISION,
    )  # fmt: skip
    middle1_ptr += first * stride_middle1
    middle1 = load_tile(middle1_ptr, stride_middle1, rows, ranks1, remaining, R1)
    dmiddle1 = tl.zeros((BLOCK_M, BLOCK_R1), tl.float32)
    begin = tl.program_id(1) * hidden_per_program
    for start in range(begin, tl.minimum(begin + hidden_per_program, H), BLOCK_N):
        hidden = start + tl.arange(0, BLOCK_N)
        u1 = load_tile(u1_ptr, stride_u1, hidden, ranks1, H, R1)
        pre = tl.dot(middle1, tl.trans(u1), input_precision=PRECISION)
        if b1_ptr is not None:
            pre += load_row(b1_ptr, hidden, H)[None, :]
        v2 = load_tile(v2_ptr, stride_v2, hidden, ranks2, H, R2)
        dh = tl.dot(dmiddle2, tl.trans(v2), input_precision=PRECISION)
        if ACTIVATION is not None:
            dh *= activation_grad(pre, ACTIVATION, dtype)
        dmiddle1 = tl.dot(dh.to(dtype), u1, dmiddle1, input_precision=PRECISION)
    if partial_ptr is not None:
        partial_ptr += (tl.program_id(1).to(tl.int64) * M + first) * R1
        store_tile(partial_ptr, R1, rows, ranks1, remaining, R1, dmiddle1)
    else:
        if dmiddle1_ptr is not None:
            store_tile(dmiddle1_ptr + first * R1, R1, rows, ranks1, remaining, R1, dmiddle1)
        if dx_ptr is not None:
            expand(
                dmiddle1.to(dtype), v1_ptr, stride_v1, None, None, 0, dx_ptr + first * K,
                remaining, K, R1, 0, K, BLOCK_M, BLOCK_N, BLOCK_R1, PRECISION,
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
    """y = (h V2) U2ᵀ + b2 + residual with h = act((x V1) U1ᵀ + b1); then x V1 and h V2, or None.

    Args:
        x, residual: (..., in) and (..., out).
        v1, u1, b1: (in, r1), (hidden, r1), (hidden,).
        v2, u2, b2: (hidden, r2), (out, r2), (out,).
        keep_intermediates: whether to give x V1 and h V2, which `backward` needs.
        epsilon: if given, the layer norm of x takes the place of x.
    """
    (k, r1), (n, r2), m = v1.shape, u2.shape, x.shape[:-1].numel()
    wide = tiles.is_wide(max(r1, r2))
    two_launches = wide or tiles.takes_two_launches(m, k, r1, x)
    if two_launches and epsilon is not None:
        x, epsilon = layer_norm(x, epsilon), None
    if wide:
        return _forward_of_two_layers(x, v1, u1, b1, v2, u2, b2, activation, residual)
    flat, residual = as_matrix(x), None if residual is None else as_matrix(residual)
    v1, u1, v2, u2 = (contiguous_rows(t) for t in (v1, u1, v2, u2))
    b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
    h, tile = u1.shape[0], tile or tiles.mlp_tile(m, max(r1, r2), x)
    out = x.new_empty(*x.shape[:-1], n)
    middle1, middle2 = (x.new_empty(*x.shape[:-1], r) if keep_intermediates else None
                        for r in (r1, r2))
    if two_launches:
        middle1 = matmul(x, v1)

    def run(tile: tiles.Tile) -> None:
        tile = one_stage_if_unaligned(tile, u1, v2)
        grid, hidden_per_program, partial = split_hidden(x, m, h, r2, tile)
        full = h % tile.BLOCK_N == 0 and (r1, r2) == (tiles.padded(r1), tiles.padded(r2))
        launch(
            low_rank_mlp_kernel, grid, x,
            None if two_launches else flat, v1, u1, b1, v2, u2, b2, residual, out,
            middle1, middle2, partial, epsilon, m, k, h, n, r1, r2,
            flat.stride(0), v1.stride(0), u1.stride(0), v2.stride(0), u2.stride(0),
            stride(residual), hidden_per_program,
            ACTIVATION=activation, BLOCK_R1=tiles.padded(r1), BLOCK_R2=tiles.padded(r2),
            PRECISION=tiles.precision(x), FULL=full, **tile.arguments(),
        )  # fmt: skip
        if partial is not None:
            expand_splits(partial, u2, b2, residual, out, middle2)

    run(tiles.best(tile, ("low_rank_mlp", m, k, h, n, r1, r2), x, run))
    return out, middle1, middle2


def _forward_of_two_layers(
    x: Tensor,
    v1: Tensor,
    u1: Tensor,
    b1: Tensor | None,
    v2: Tensor,
    u2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`forward` of wide ranks: two low-rank layers, with a written hidden layer."""
    hidden, middle1 = low_rank_linear.forward(x, v1, u1, b1, activation)
    out, middle2 = low_rank_linear.forward(hidden, v2, u2, b2, None, residual)
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
    """The gradients of x, V1, U1, b1, V2, U2 and b2; None where `needs` is False.

    Args:
        grad: the gradient of y, (..., out).
        middle1, middle2: x V1 and h V2 from `forward`, (..., r1) and (..., r2).
    """
    if tiles.is_wide(max(v1.shape[1], v2.shape[1])):
        return _backward_of_two_layers(
            grad, x, v1, u1, b1, v2, u2, b2, activation, middle1, middle2, needs
        )
    need_x, need_v1, need_u1, need_b1, need_v2, need_u2, need_b2 = needs
    v1, u1, v2, u2 = (contiguous_rows(t) for t in (v1, u1, v2, u2))
    b1 = None if b1 is None else b1.contiguous()
    need_hidden = need_u1 or need_b1 or need_v2
    dx = dmiddle1 = dmiddle2 = None
    if need_x or need_v1 or need_hidden:
        dx, dmiddle1, dmiddle2 = _input_grads(
            grad, middle1, v1, u1, b1, v2, u2, activation, need_x, need_v1, need_hidden, tile
        )
    du1, db1, dv2 = hidden_grads(
        middle1, dmiddle2, u1, b1, v2, activation, need_u1, need_b1, need_v2
    )
    dv1 = None if dmiddle1 is None else weight_grad(x, dmiddle1)
    du2 = weight_grad(grad, middle2) if need_u2 else None
    return dx, dv1, du1, db1, dv2, du2, row_sum(grad) if need_b2 else None


def _backward_of_two_layers(
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
) -> tuple[Gradient, ...]:
    """`backward` of wide ranks: those of two low-rank layers, with the hidden layer recomputed."""
    need_dhidden = any(needs[:4])
    (hidden,) = project(middle1, b1, u1, activation=activation)
    dhidden, *last = low_rank_linear.backward(
        grad, hidden, v2, u2, b2, None, middle2, (need_dhidden, *needs[4:])
    )
    if dhidden is None:
        return None, None, None, None, *last
    first = low_rank_linear.backward(dhidden, x, v1, u1, b1, activation, middle1, needs[:4])
    return *first, *last


def _input_grads(
    grad: Tensor,
    middle1: Tensor,
    v1: Tensor,
    u1: Tensor,
    b1: Tensor | None,
    v2: Tensor,
    u2: Tensor,
    activation: str | None,
    need_x: bool,
    need_v1: bool,
    need_hidden: bool,
    tile: tiles.Tile | None,
) -> tuple[Gradient, Gradient, Gradient]:
    """The gradients of x, of x V1 for V1's, and of h V2 for those of the hidden layer."""
    flat, flat_middle1 = as_matrix(grad), as_matrix(middle1)
    (m, n), (k, r1), (h, r2) = flat.shape, v1.shape, v2.shape
    lead = grad.shape[:-1]
    dx = grad.new_empty(*lead, k) if need_x else None
    dmiddle1 = grad.new_empty(*lead, r1) if need_v1 else None
    dmiddle2 = grad.new_empty(*lead, r2) if need_hidden else None
    # The kernel keeps four blocks of rows in registers. It spills on sm_89 with more than 64 rows,
    # and in tf32x3 on sm_80 with more than 16. In tf32 Triton transposes U1 through registers but
    # not V2 (see one_stage_if_unaligned), so there are fewer rows than a wgmma takes.
    most = 128 // tiles.operand_bytes(grad)
    tile = tile or tiles.row_tile(m, max(r1, r2), grad, factors=2, most=most)
    tile = one_stage_if_unaligned(tile, u1, v2)
    two_launches = tiles.takes_two_launches(m, n, r2, grad)
    if two_launches:
        dmiddle2 = matmul(grad, u2)
    grid, hidden_per_program, partial = split_hidden(grad, m, h, r1, tile, need_x)
    launch(
        low_rank_mlp_backward_kernel, grid, grad,
        None if two_launches else flat, u2, v2, flat_middle1, u1, b1, v1,
        dx, dmiddle1, dmiddle2, partial, m, k, h, n, r1, r2,
        flat.stride(0), flat_middle1.stride(0),
        v1.stride(0), u1.stride(0), v2.stride(0), u2.stride(0), hidden_per_program,
        ACTIVATION=activation, BLOCK_R1=tiles.padded(r1), BLOCK_R2=tiles.padded(r2),
        PRECISION=tiles.precision(grad), **tile.arguments(), **tiles.registers(tile, blocks=1),
    )  # fmt: skip
    if partial is not None and dx is not None:
        expand_splits(partial, v1, None, None, dx, dmiddle1)
    return dx, dmiddle1, dmiddle2


def split_hidden(
    x: Tensor, m: int, h: int, r: int, tile: tiles.Tile, wanted: bool = True
) -> tuple[tuple[int, int], int, Tensor | None]:
    """The grid, the hidden units of one program, and memory for partial sums (splits, m, r).

    Without a split (one is enough, or none is `wanted`) there are no partial sums.
    """
    blocks = triton.cdiv(m, tile.BLOCK_M)
    hidden_per_program = tiles.columns_per_program(h, tile.BLOCK_N, blocks)
    splits = triton.cdiv(h, hidden_per_program)
    if splits < 2 or not wanted:
        return (blocks, 1), h, None
    partial = x.new_empty(splits, m, r, dtype=torch.float32)
    return (blocks, splits), hidden_per_program, partial
