"""The interpolative decomposition: a few rows of a factor, and its other rows in terms of them.

    V (k, r) = X V_P,  X = [I at the rows P, rest elsewhere],  V_P (r, r) the rows P of V

(Cheng, Gimbutas, Martinsson and Rokhlin, SIAM J. Sci. Comput. 2005). ``checkpoint.gauge`` stores
``rest`` and P instead of V and multiplies V_P into the factor that V belongs to.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Interpolation(NamedTuple):
    """V = X ``mixing``; any dimensions may lead.

    rest: (..., k - r, r), the rows of X that are not in P, in the dtype of V.
    pivots: (..., r), P in ascending order.
    mixing: (..., r, r), V_P in float64.
    """

    rest: Tensor
    pivots: Tensor
    mixing: Tensor


def interpolate(v: Tensor) -> Interpolation:
    """The decomposition of finite v (..., k, r), r ≤ k, computed in float64."""
    k, r = v.shape[-2:]
    basis, triangle = torch.linalg.qr(v.double())
    pivots = pivot_rows(basis)
    chosen = _rows(basis, pivots)
    interpolation = torch.linalg.solve(chosen, basis, left=False)
    rest = interpolation[_others(pivots, k)].unflatten(0, (*v.shape[:-2], k - r))
    return Interpolation(rest.to(v.dtype).contiguous(), pivots, chosen @ triangle)


def interpolated(rest: Tensor, pivots: Tensor) -> Tensor | None:
    """X (..., k, r) from the ``rest`` and ``pivots`` of a decomposition.

    None where a pivot stands twice, so that ``rest`` has not the rows that are left.
    """
    r, index = pivots.shape[-1], pivots.long()
    k = rest.shape[-2] + r
    others = _others(index, k)
    if others.sum() != rest.shape[:-1].numel():
        return None
    x = rest.new_zeros(*rest.shape[:-2], k, r)
    x.scatter_(-2, index[..., None].expand(*index.shape, r),
               torch.eye(r, dtype=x.dtype, device=x.device).expand(*index.shape, r))
    x[others] = rest.flatten(0, -2)
    return x


def pivot_rows(basis: Tensor) -> Tensor:
    """Indices of r rows of orthonormal columns (..., k, r), ascending: pivoted QR of the rows.

    Each row is the one farthest from the span of those before it, which keeps the other rows'
    coefficients small.
    """
    remainder, chosen = basis.clone(), []
    for _ in range(basis.shape[-1]):
        lengths = remainder.square().sum(-1)
        for index in chosen:
            lengths.scatter_(-1, index, -1.0)  # rounding must not choose a row again
        chosen.append(lengths.argmax(-1, keepdim=True))
        row = _rows(remainder, chosen[-1])
        row = row / row.norm(dim=-1, keepdim=True)
        remainder = remainder - (remainder @ row.mT) @ row
    return torch.cat(chosen, -1).sort(-1).values


def _rows(matrix: Tensor, index: Tensor) -> Tensor:
    return matrix.gather(-2, index[..., None].expand(*index.shape, matrix.shape[-1]))


def _others(index: Tensor, k: int) -> Tensor:
    """(..., k), True at the rows that ``index`` does not name."""
    found = torch.ones(*index.shape[:-1], k, dtype=torch.bool, device=index.device)
    return found.scatter_(-1, index, False)
