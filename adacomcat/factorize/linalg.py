"""Linear algebra of factorisations in float64: shrinkage, roots, triangles, spectra."""

import torch
from torch import Tensor

from adacomcat.errors import UserError
from adacomcat.ops.decompositions import gram

# A covariance is never trusted below this fraction of its mean eigenvalue.
EIGENVALUE_FLOOR = 1e-6
# A variance that stands for none, which constant inputs have, such as those behind a norm of zeros.
NO_VARIANCE = 1e-30
# The largest condition for which a Gram matrix, which squares it, leaves spectra of six digits.
GRAM_CONDITION = 1e4


def require_finite(name: str, **tensors: Tensor | None) -> None:
    """UserError where a tensor of the layer ``name`` holds NaN or infinity."""
    for what, tensor in tensors.items():
        if tensor is None or not tensor.numel() or not tensor.is_floating_point():
            continue
        tensor = tensor.detach()
        if tensor.is_meta:
            raise UserError(f"{name}: its {what} lies on the meta device and has no values; load "
                            "the weights first")
        if tensor.itemsize == 1:  # float8 has no comparisons
            tensor = tensor.float()
        # NaN passes into the extremes, which take one pass and no second tensor.
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise UserError(f"{name}: its {what} holds NaN or infinite values; "
                            "repair the checkpoint or the calibration images")


def ridge(covariance: Tensor, strength: float) -> Tensor:
    """λ m with m the mean of C's diagonal and λ the strength; (..., 1, 1), positive where λ is.

    Inputs that never change have no variance, and a relative ridge alone would be 0 there.
    """
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return strength * mean.clamp_min(NO_VARIANCE)


def shrink(covariance: Tensor, strength: float) -> Tensor:
    """C + λ m I, with the ridge λ m: directions that no calibration image has keep a weight."""
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return covariance + ridge(covariance, strength) * identity


def square_roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and C^-½ by eigh, with a floor relative to the mean eigenvalue: C is often singular."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = EIGENVALUE_FLOOR * values.mean(-1, keepdim=True).clamp_min(NO_VARIANCE)
    roots = torch.maximum(values, floor).sqrt().unsqueeze(-2)
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def square_root(covariance: Tensor) -> Tensor:
    """C^½, with the floor of ``square_roots``."""
    return square_roots(covariance)[0]


def descending_eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0) and eigenvectors, largest first."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def triangle(a: Tensor, covariance: Tensor | None = None) -> Tensor:
    """R of C^½ a = Q R in float64, for thin a (..., d, r): Rᵀ R = aᵀ C a.

    By the Cholesky factor of aᵀ C a, which needs no root of C; by QR where that would lose digits.
    """
    if covariance is None:
        product = gram(a)
    else:
        a = a.double()
        product = a.mT @ (covariance @ a)
    lower = _cholesky(product)
    if lower is None:
        whitened = a.double() if covariance is None else square_root(covariance) @ a
        return torch.linalg.qr(whitened, mode="r").R
    return lower.mT


def triangle_of(product: Tensor) -> Tensor:
    """R with Rᵀ R = ``product``, symmetric and in float64; no triangle where it is singular."""
    lower = _cholesky(product)
    if lower is None:
        values, vectors = torch.linalg.eigh(product)
        return values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT
    return lower.mT


def _cholesky(product: Tensor) -> Tensor | None:
    """The Cholesky factor; None where it would lose digits."""
    lower, failed = torch.linalg.cholesky_ex(product)
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    lost = failed.any() or (diagonal.amin(-1) * GRAM_CONDITION < diagonal.amax(-1)).any()
    return None if lost else lower
