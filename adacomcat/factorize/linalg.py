"""Weights, and statistics of what flows into them, to factors. Everything in float64.

All decompositions are nested: rank r is the first r columns, and the squared error of every rank
is the tail of one spectrum.
"""

import torch
from torch import Tensor

from adacomcat.errors import UserError
from adacomcat.ops import backends
from adacomcat.ops.decompositions import batched_svd

# A covariance is never trusted below this fraction of its mean eigenvalue.
EIGENVALUE_FLOOR = 1e-6
# A Gram matrix squares the condition: up to this one, spectra keep six digits and more in float64.
GRAM_CONDITION = 1e4
# Rows that a Gram matrix takes at a time: as many as columns, within these limits.
PANEL = (256, 512)


def require_finite(name: str, **tensors: Tensor | None) -> None:
    for what, tensor in tensors.items():
        # Extremes, which NaN passes through, take one pass and no second tensor.
        if tensor is not None and tensor.numel() and not all(
                extreme.isfinite() for extreme in tensor.aminmax()):
            raise UserError(f"{name}: its {what} holds NaN or infinite values; "
                            "repair the checkpoint or the calibration images")


def shrink(covariance: Tensor, strength: float) -> Tensor:
    """C + λ m I, m the mean of C's diagonal: directions that calibration never saw keep weight."""
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return covariance + strength * mean * identity


def square_roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and C^-½ by eigh, with a floor relative to the mean eigenvalue: C is often singular."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = EIGENVALUE_FLOOR * values.mean(-1, keepdim=True).clamp_min(1e-300)
    roots = torch.maximum(values, floor).sqrt().unsqueeze(-2)
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def square_root(covariance: Tensor) -> Tensor:
    return square_roots(covariance)[0]


def descending_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0) and eigenvectors, largest first."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def gram(a: Tensor) -> Tensor:
    """aᵀ a in float64, (..., n, n), for a in any precision.

    Panels of rows stay in cache and spare a float64 copy of all of a; of the result only the
    blocks above the diagonal are computed.
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
    """Of symmetric a (..., n, n) in float64, ascending, (..., n)."""
    return (backends.direct_kernel("eigenvalues", a) or torch.linalg.eigvalsh)(a)


def singular_values(a: Tensor) -> Tensor:
    """(..., R) descending: those of ``batched_svd`` without its vectors."""
    kernel = backends.direct_kernel("singular_values", a)
    return kernel(a) if kernel else batched_svd(a)[1]


def triangle(a: Tensor, covariance: Tensor | None = None) -> Tensor:
    """R in float64 with Rᵀ R = aᵀ C a for thin a (..., d, r): what C^½ a = Q R has as its R.

    By Cholesky of the Gram matrix, which needs no root of C; by QR where that would lose digits.
    """
    if covariance is None:
        product = gram(a)
    else:
        a = a.double()
        product = a.mT @ (covariance @ a)
    lower, failed = torch.linalg.cholesky_ex(product)
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    if failed.any() or (diagonal.amin(-1) * GRAM_CONDITION < diagonal.amax(-1)).any():
        whitened = a.double() if covariance is None else square_root(covariance) @ a
        return torch.linalg.qr(whitened, mode="r").R
    return lower.mT
