"""An MLP's factors in the gauge that saves products: of U1 and of V2 some rows are the identity's.

h = act(x V1 U1ᵀ + b1), y = h V2 U2ᵀ. For every invertible A, U1 A and V1 A⁻ᵀ are the same map.
With A⁻¹ = [U1_P; Nᵀ], P some hidden neurons and N an orthonormal basis of what is orthogonal to
their rows, these rows become [I, 0]: before their activation the neurons P are columns of x V1. So
do rows Q of V2: the neurons Q are what h V2 begins with. ``csrc/cpu/mlp.cpp`` finds both and
multiplies neither: of (in + hidden) r1 + (hidden + out) r2 multiplications |P| r1 + |Q| r2 less.
"""

from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 32  # what the kernel looks for: so many rows, or a multiple
# Of as many neurons as the rank U1_P is conditioned like a square random matrix, and rounding
# errors double; of 3/4 of them they grow by a twentieth on real weights.
MOST = 3 / 4
LEAST_SINGULAR = 1 / 64  # of rows of orthonormal columns; 1/8 to 1/16 is usual


class Factors(NamedTuple):
    """v1 (in, r1), u1 (hidden, r1), b1 (hidden,), v2 (hidden, r2), u2 (out, r2); float64."""

    v1: Tensor
    u1: Tensor
    b1: Tensor
    v2: Tensor
    u2: Tensor


def with_identities(f: Factors) -> Factors:
    """The same MLP, its neurons in the order Q, others, P; of small ranks P and Q are empty."""
    neurons = torch.arange(len(f.b1), device=f.b1.device)
    u1, v1, last = _with_identity(f.u1, f.v1, neurons)
    others = neurons[~torch.isin(neurons, last)]
    v2, u2, first = _with_identity(f.v2, f.u2, others)
    order = torch.cat([first, others[~torch.isin(others, first)], last])
    return Factors(v1, u1[order], f.b1[order], v2[order], u2)


def _with_identity(factor: Tensor, other: Tensor,
                   candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """factor A, other A⁻ᵀ, and which of the candidates are rows [I, 0] of the first."""
    rank, nothing = factor.shape[1], candidates[:0]
    size = int(MOST * rank) // UNIT * UNIT
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

    Of an orthonormal basis they are about as good as those of a pivoted QR decomposition (Dong and
    Martinsson, Advances in Computational Mathematics 2023), and come 40 to 100 times as fast as
    ``gauge.pivot_rows``: 8 ms instead of 0.9 s for 3072 rows of 256.
    """
    order = list(range(len(matrix)))
    for step, pivot in enumerate(torch.linalg.lu_factor_ex(matrix).pivots.tolist()):
        order[step], order[pivot - 1] = order[pivot - 1], order[step]
    return torch.tensor(order, device=matrix.device)
