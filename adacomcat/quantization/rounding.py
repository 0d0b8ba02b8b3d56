"""Weights in float → whole numbers with scales, by least squares.

On 8 bits an output channel has one scale; on 4 bits every group of its inputs has one, whose step
is chosen by least squares, too. Without statistics every number goes to the nearest point of its
grid. With the covariance C of the layer's inputs the numbers are rounded one input after the other,
and the inputs that follow make up for the error: that lowers
E|x (W - Ŵ)ᵀ|² = tr (W - Ŵ) C (W - Ŵ)ᵀ (Frantar et al., GPTQ, arXiv 2210.17323). The mean of the
error goes into the bias.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adacomcat.factorize.factors import LinearStatistics
from adacomcat.factorize.linalg import shrink
from adacomcat.ops import int4, int8
from adacomcat.ops.int4 import Int4Weight
from adacomcat.ops.int8 import Int8Weight

SHRINKAGE = 0.01  # of the covariance; GPTQ's own
BLOCK = 128  # inputs whose errors are handed on together
CLIPPED = torch.linspace(0.5, 1, 11)  # of a group's largest number: where its grid of 4 bits ends


class Grid(NamedTuple):
    """Where numbers may lie: q · step, with whole numbers q from -levels to levels."""

    step: Tensor  # (out, in), or (out, 1) where a row has one
    levels: int
    scale: Tensor  # the steps as a layer holds them

    def nearest(self, weight: Tensor, column: int | None = None) -> Tensor:
        """q of ``weight`` (out, in), or of one column (out,)."""
        step = self.step if column is None else self.step[:, column]
        return (weight / step).round().clamp(-self.levels, self.levels)

    def sorted(self, order: Tensor) -> "Grid":
        """The grid of the inputs in this order."""
        return self._replace(step=self.step.expand(-1, len(order))[:, order])

    def weight(self, q: Tensor) -> Int8Weight | Int4Weight:
        """What a layer holds of q (out, in)."""
        if self.levels == int8.LEVELS:
            return Int8Weight(q.to(torch.int8), self.scale)
        return Int4Weight.of(q, self.scale)


class Rounded(NamedTuple):
    """A layer on few bits."""

    weight: Int8Weight | Int4Weight
    bias: Tensor | None  # (out,)


def round_linear(weight: Tensor, bias: Tensor | None, statistics: LinearStatistics | None = None,
                 bits: int = 8) -> Rounded:
    """x Wᵀ + b on weights of so many bits.

    Args:
        weight: W, (out, in).
        bias: b, (out,) or None; without one there is nothing to absorb the mean error, so that
            E[x xᵀ] takes the place of C.
        statistics: Of x.
        bits: 8 or 4.
    """
    weight = weight.double()
    if statistics is not None and bias is None:
        statistics = statistics.about_zero()
    covariance = None if statistics is None else shrink(statistics.covariance.to(weight), SHRINKAGE)
    grid = _rows(weight) if bits == 8 else _groups(weight, covariance)
    if statistics is None or covariance is None:
        return Rounded(grid.weight(grid.nearest(weight)), bias)
    found = grid.weight(_with_feedback(weight, grid, covariance))
    if bias is not None:
        missing = (weight - found.dense.double()) @ statistics.mean.to(weight)
        bias = bias + missing.to(bias.dtype)
    return Rounded(found, bias)


def _rows(weight: Tensor) -> Grid:
    """8 bits: a scale for each row, which its largest number decides."""
    largest = weight.abs().amax(1).float() / int8.LEVELS
    scale = largest.where(largest > 0, 1)
    return Grid(scale.double().unsqueeze(1), int8.LEVELS, scale)


def _groups(weight: Tensor, covariance: Tensor | None) -> Grid:
    """4 bits: of the scales of a group the one of least Σ_i C_ii (w_i - q_i s)²."""
    inputs = weight.shape[1]
    variance = weight.new_ones(inputs) if covariance is None else covariance.diagonal()
    padding = 0, -inputs % int4.GROUP
    grouped = F.pad(weight, padding).unflatten(1, (-1, int4.GROUP))
    variance = F.pad(variance, padding).view(-1, int4.GROUP)
    largest = grouped.abs().amax(2) / int4.LEVELS
    best, scale = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for share in CLIPPED.to(largest):
        tried = (share * largest).bfloat16().double()
        tried = tried.where(tried > 0, 1)
        q = (grouped / tried.unsqueeze(2)).round().clamp(-int4.LEVELS, int4.LEVELS)
        error = ((grouped - q * tried.unsqueeze(2)).square() * variance).sum(2)
        best, scale = error.minimum(best), tried.where(error < best, scale)
    return Grid(int4.spread(scale, inputs), int4.LEVELS, scale.bfloat16())


def _with_feedback(weight: Tensor, grid: Grid, covariance: Tensor) -> Tensor:
    """q. With C⁻¹ = Tᵀ T, T upper triangular, an error e at input i adds -e T_ij / T_ii at j > i.

    Inputs of large variance come first, while many others can still make up for them.
    """
    order = covariance.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest, grid = weight[:, order], grid.sorted(order)
    q = torch.empty_like(rest)
    for start in range(0, rest.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, rest.shape[1]))
        errors = torch.empty_like(rest[:, block])
        for i in range(block.start, block.stop):
            q[:, i] = grid.nearest(rest[:, i], i)
            error = (rest[:, i] - q[:, i] * grid.step[:, i]) / upper[i, i]
            errors[:, i - start] = error
            rest[:, i:block.stop] -= torch.outer(error, upper[i, i:block.stop])
        rest[:, block.stop:] -= errors @ upper[block, block.stop:]
    return q[:, order.argsort()]
