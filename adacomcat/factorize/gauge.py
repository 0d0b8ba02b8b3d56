"""The gauge of a low-rank MLP in which rows of U1 and of V2 are rows of the identity matrix.

h = act(x V1 U1ᵀ + b1), y = h V2 U2ᵀ. The factors have a gauge freedom: for every invertible A,
U1 A and V1 A⁻ᵀ give the same map. Let P be some hidden neurons, and N an orthonormal basis of the
complement of their rows of U1. With A⁻¹ = [U1_P; Nᵀ] these rows become [I, 0]: before its
activation every neuron of P is a column of x V1. Likewise rows Q of V2 become [I, 0]: h V2 begins
with the neurons Q. The CPU kernel of ``low_rank_mlp`` finds both and multiplies neither. This saves
|P| r1 + |Q| r2 of (in + hidden) r1 + (hidden + out) r2 multiplications for each row of x.

``optimize`` calls ``identity_gauge``. ``checkpoint.gauge`` uses the same freedom, with other
pivots, to store fewer weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# The kernel looks for a multiple of this many rows of the identity.
ROW_MULTIPLE = 32
# The largest |P| as a share of the rank. At |P| = rank, U1_P is conditioned like a square random
# matrix, and the rounding error of the output doubles. At 3/4 it grows by 5 % on real weights.
LARGEST_SHARE = 3 / 4
# The least singular value of the chosen rows of an orthonormal basis; 1/8 to 1/16 is usual.
LEAST_SINGULAR = 1 / 64


class MlpFactors(NamedTuple):
    """v1 (in, r1), u1 (hidden, r1), b1 (hidden,), v2 (hidden, r2), u2 (out, r2); float64."""

    v1: Tensor
    u1: Tensor
    b1: Tensor
    v2: Tensor
    u2: Tensor


def identity_gauge(f: MlpFactors) -> MlpFactors:
    """The same MLP with its neurons in the order Q, others, P. Where a rank is too small, where its
    weights are not finite or where its rows are ill-conditioned, P or Q is empty."""
    neurons = torch.arange(len(f.b1), device=f.b1.device)
    u1, v1, last = _with_identity(f.u1, f.v1, neurons)
    others = neurons[~torch.isin(neurons, last)]
    v2, u2, first = _with_identity(f.v2, f.u2, others)
    order = torch.cat([first, others[~torch.isin(others, first)], last])
    return MlpFactors(v1, u1[order], f.b1[order], v2[order], u2)


def _with_identity(factor: Tensor, other: Tensor,
                   candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``factor`` A, ``other`` A⁻ᵀ, and the candidates that are rows [I, 0] of the first."""
    rank, nothing = factor.shape[1], candidates[:0]
    size = int(LARGEST_SHARE * rank) // ROW_MULTIPLE * ROW_MULTIPLE
    if not size or len(candidates) < rank or not factor.isfinite().all():
        return factor, other, nothing
    basis, triangle = torch.linalg.qr(factor)
    chosen = candidates[_pivots(basis[candidates])[:size]]
    rows = basis[chosen]
    if torch.linalg.svdvals(rows)[-1] < LEAST_SINGULAR:
        return factor, other, nothing
    span, upper = torch.linalg.qr(rows.mT, mode="complete")
    span, rest = span[:, :size], span[:, size:]
    inverse = torch.linalg.solve_triangular(upper[:size].mT, span, upper=False, left=False)
    mixing = torch.cat([inverse, rest], 1)  # A
    mixed = basis @ mixing
    mixed[chosen] = torch.eye(rank, dtype=mixed.dtype, device=mixed.device)[:size]
    return mixed, other @ (torch.cat([rows, rest.mT]) @ triangle).mT, chosen


def _pivots(matrix: Tensor) -> Tensor:
    """Rows in the order in which Gaussian elimination with partial pivoting takes them.

    For an orthonormal basis these rows are about as well conditioned as those of a pivoted QR
    decomposition (Dong and Martinsson, Advances in Computational Mathematics 2023). They take
    8 ms for 3072 rows of 256, where pivoted QR in PyTorch takes 0.9 s.
    """
    order = list(range(len(matrix)))
    for step, pivot in enumerate(torch.linalg.lu_factor_ex(matrix).pivots.tolist()):
        order[step], order[pivot - 1] = order[pivot - 1], order[step]
    return torch.tensor(order, device=matrix.device)
