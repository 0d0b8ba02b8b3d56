"""Truncated decompositions as ops, and the error that every truncation of a spectrum leaves.

Triples (u, s, v) have a ≈ u diag(s) vᵀ with s descending and the largest element of each left
vector (the first of equals) positive. They take float32 and float64. The gradient of a truncation
needs the spectrum that was cut off, so a backward pass decomposes anew, without truncation.
"""

import torch
from torch import Tensor

from adacomcat.ops import backends, shapes
from adacomcat.ops.registry import OPS

__all__ = ["batched_svd", "eigenvalues", "factored_svd", "gram", "low_rank_approximation",
           "singular_values", "truncation_errors"]

Triple = tuple[Tensor, Tensor, Tensor]
# The least and the most rows that a Gram matrix takes at a time; in between as many as columns.
PANEL = (256, 512)


def batched_svd(a: Tensor, k: int | None = None) -> Triple:
    """The k largest singular triples of many small matrices.

    Small singular values of matrices graded by columns keep their relative accuracy where a kernel
    runs (one-sided Jacobi; Demmel and Veselić, 1992). Gradients follow Townsend, "Differentiating
    the singular value decomposition".

    Args:
        a: (..., m, n), float32 or float64.
        k: How many triples; all min(m, n) by default.

    Returns:
        u (..., m, k), s (..., k), v (..., n, k).

    Raises:
        ValueError: A matrix holds NaN or infinity; the message gives its index. In the backward
            pass: the gradient of vectors is asked for and singular values are equal.
        RuntimeError: a is no matrix or of another dtype, or k is out of range.
    """
    k = min(a.shape[-2:]) if k is None else k
    if not (torch.is_grad_enabled() and a.requires_grad) and (
            kernel := backends.direct_kernel("batched_svd", a)):
        return kernel(a, k)
    return OPS["batched_svd"].every_result(a, k)


def factored_svd(a: Tensor, b: Tensor, k: int | None = None, root_a: Tensor | None = None,
                 root_b: Tensor | None = None) -> Triple:
    """Singular triples of a bᵀ for thin factors, without their product: QR, then an r × r SVD.

    Args:
        a: (..., m, r), float32 or float64.
        b: (..., n, r), like a.
        k: How many triples; all min(m, n, r) by default.
        root_a: (..., m, m), the root of a metric: a becomes root_a a.
        root_b: (..., n, n), the root of a metric: b becomes root_b b.

    Returns:
        u (..., m, k), s (..., k), v (..., n, k).

    Raises:
        ValueError: As for ``batched_svd``; the message names a or b.
        RuntimeError: Shapes or dtypes do not fit, or k is out of range.
    """
    a = a if root_a is None else root_a @ a
    b = b if root_b is None else root_b @ b
    return OPS["factored_svd"].every_result(a, b, shapes.rank_limit(a, b) if k is None else k)


def low_rank_approximation(a: Tensor, k: int | None = None) -> Triple:
    """The k largest singular triples of a linear layer's weight, by the smaller Gram matrix.

    Computed in float64: the error of the approximation is at most √ε₆₄ |a| above the best one, and
    singular values are exact to ε₆₄ κ².

    Args:
        a: (..., m, n), float32 or float64.
        k: How many triples; all min(m, n) by default.

    Returns:
        u (..., m, k), s (..., k), v (..., n, k), in a's dtype.

    Raises:
        ValueError: As for ``batched_svd``.
        RuntimeError: a is no matrix or of another dtype, or k is out of range.
    """
    return OPS["low_rank_approximation"].every_result(a, min(a.shape[-2:]) if k is None else k)


def truncation_errors(s: Tensor) -> Tensor:
    """Squared error of every rank: errors[r] = Σ_h Σ_{i ≥ r} s_hi².

    Args:
        s: (..., H, R), float32 or float64: descending singular values of H matrices that are cut at
            one rank (the heads of an attention), zero-padded where layers differ.

    Returns:
        (..., R + 1).

    Raises:
        RuntimeError: s is no matrix or of another dtype.
    """
    return OPS["truncation_errors"].every_result(s)


def gram(a: Tensor) -> Tensor:
    """aᵀ a in float64.

    Panels of rows stay in cache and spare a float64 copy of all of a; only the blocks above the
    diagonal are computed.

    Args:
        a: (..., m, n), in any precision.

    Returns:
        (..., n, n), float64. Nothing differentiates it.
    """
    if kernel := backends.direct_kernel("gram", a):
        return kernel(a)
    n = a.shape[-1]
    width = max(64, -(-n // 6))
    product = a.new_zeros(*a.shape[:-2], n, n, dtype=torch.float64)
    for rows in a.split(min(max(n, PANEL[0]), PANEL[1]), -2):
        panel = rows.double()
        for start in range(0, n, width):
            block = slice(start, start + width)
            product[..., block, start:] += panel[..., block].mT @ panel[..., start:]
    for stop in range(width, n, width):
        product[..., stop:, stop - width:stop] = product[..., stop - width:stop, stop:].mT
    return product


def eigenvalues(a: Tensor) -> Tensor:
    """The eigenvalues of symmetric matrices.

    Args:
        a: (..., n, n), symmetric, float64.

    Returns:
        (..., n), ascending. Nothing differentiates it.

    Raises:
        ValueError: A matrix holds NaN or infinity.
        RuntimeError: a is not square.
    """
    return (backends.direct_kernel("eigenvalues", a) or torch.linalg.eigvalsh)(a)


def singular_values(a: Tensor) -> Tensor:
    """The s of ``batched_svd``, without vectors.

    Args:
        a: (..., m, n), float32 or float64.

    Returns:
        (..., min(m, n)), descending. Where a kernel runs, nothing differentiates it.

    Raises:
        ValueError: A matrix holds NaN or infinity.
    """
    kernel = backends.direct_kernel("singular_values", a)
    return kernel(a) if kernel else batched_svd(a)[1]
