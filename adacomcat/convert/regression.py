"""Streaming least squares that is shrunk towards known weights, dense or of a given rank."""

import torch
from torch import Tensor

from adacomcat.convert.moments import Moments, at_least_float32
from adacomcat.factorize.factors import balance
from adacomcat.factorize.linalg import descending_eigh, shrink

# Shrinkage towards the dense weights where a layer corrects the drift of those before it. It is
# strong because such corrections fit the calibration images far better than other images. Relative
# error of the final features of DINOv2 ViT-S on other photographs (examples/dinov2): 0.463 at 0.1,
# 0.445 at 1, 0.676 without correction.
CORRECTION_SHRINKAGE = 1.0

# A regression takes about this many rows. More add time and little knowledge, since the tokens of
# one image resemble each other.
ROWS_PER_DIMENSION = 24
LEAST_ROWS = 32768


def row_stride(tokens: int, width: int) -> int:
    """Take every k-th of ``tokens`` rows of this width."""
    return max(1, tokens // max(LEAST_ROWS, ROWS_PER_DIMENSION * width))


class Regression:
    """Streaming least squares of targets (M, out) on inputs (M, in), shrunk towards ``weight``."""

    def __init__(self, weight: Tensor, shrinkage: float, tokens: int = 0) -> None:
        self.weight, self.shrinkage = weight.double(), shrinkage
        self.stride = row_stride(tokens, weight.shape[1])
        self.inputs = Moments()
        self.cross = self.weight.new_zeros(self.weight.mT.shape)
        self.target_sum = self.weight.new_zeros(len(weight))

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        inputs, targets = (at_least_float32(rows.flatten(0, -2)[::self.stride])
                           for rows in (inputs, targets))
        shifted = self.inputs.add(inputs)
        self.cross = self.cross + (shifted.mT @ targets).double()
        self.target_sum = self.target_sum + targets.sum(0).double()

    def on_inputs(self, kept: Tensor, weight: Tensor) -> "Regression":
        """The same on the ``kept`` inputs only, shrunk towards ``weight`` (out, kept)."""
        part = Regression(weight, self.shrinkage)
        part.inputs = self.inputs.of(kept)
        part.cross, part.target_sum = self.cross[kept], self.target_sum
        return part

    def on_mapped(self, rows: Tensor, weight: Tensor) -> "Regression":
        """The same on the inputs x ``rows``ᵀ, rows (n, in), shrunk towards ``weight`` (out, n)."""
        part = Regression(weight, self.shrinkage)
        part.inputs = self.inputs.mapped(rows)
        part.cross, part.target_sum = rows.double() @ self.cross, self.target_sum
        return part

    def solve(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """(v, u, bias) of the best map of this rank: reduced-rank regression.

        The rank keeps the top right singular vectors R of Lᵀ B, C + λ m I = L Lᵀ: v = B R, u = R.
        """
        solution = self._solution()
        lower = torch.linalg.cholesky(shrink(self.inputs.covariance, self.shrinkage))
        right = _top_right_singular_vectors(lower.mT @ solution, rank)
        v, u = balance(solution @ right, right)
        return v, u, self._bias(v @ u.mT)

    def solve_dense(self) -> tuple[Tensor, Tensor]:
        """(weight (out, in), bias)."""
        solution = self._solution()
        return solution.mT, self._bias(solution)

    def _bias(self, solution: Tensor) -> Tensor:
        return self.target_sum / self.inputs.count - self.inputs.mean @ solution

    def _solution(self) -> Tensor:
        """B = Wᵀ + (C + κ m I)⁻¹ (Cxy - C Wᵀ), κ the correction's own, stronger shrinkage."""
        covariance, weight = self.inputs.covariance, self.weight.mT
        count = self.inputs.count
        cross = self.cross / count - torch.outer(self.inputs.sum / count, self.target_sum / count)
        lower = torch.linalg.cholesky(shrink(covariance, CORRECTION_SHRINKAGE))
        return weight + torch.cholesky_solve(cross - covariance @ weight, lower)


def _top_right_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """(columns, rank), from the smaller of the two Gram matrices."""
    rows, columns = matrix.shape
    if columns <= rows:
        return descending_eigh(matrix.mT @ matrix)[1][:, :rank]
    left = descending_eigh(matrix @ matrix.mT)[1]
    # Orthonormal also where singular values are 0, as those of a projection that is.
    return torch.linalg.qr(matrix.mT @ left[:, :rank]).Q
