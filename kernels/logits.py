"""The logits of an attention, and their exponents below the maximum of a row."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def masked_logits(
    a, b, scale, mask_ptr, stride_mask_rows, stride_mask_columns, rows, columns, N,
    IS_BOOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a bᵀ · scale + mask, -inf where masked: a (rows, rank), b (columns, rank).

    The unit is ln 2, which turns exp into exp2, unless there is an additive mask: in this unit the
    largest masks would be infinite. Rows are queries and columns keys, or the reverse.
    """
    logits = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    inside = columns[None, :] < N
    if mask_ptr is None:
        logits *= scale * LOG2_E
    else:
        ptrs = mask_ptr + rows[:, None] * stride_mask_rows + columns[None, :] * stride_mask_columns
        mask = tl.load(ptrs, mask=(rows[:, None] < N) & inside, other=0)
        if IS_BOOL:
            logits *= scale * LOG2_E
            inside = inside & (mask != 0)
        else:
            logits = logits * scale + mask.to(tl.float32)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def finite_maximum(maximum):
    """The maximum of a row, or 0 where the whole row is masked, since -inf - -inf is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def exponents(logits, maximum, mask_ptr, IS_BOOL: tl.constexpr):
    """log2 of exp(logits - maximum), for logits in the unit of `masked_logits`."""
    below = logits - maximum
    if mask_ptr is not None:
        if not IS_BOOL:
            below *= LOG2_E
    return below
