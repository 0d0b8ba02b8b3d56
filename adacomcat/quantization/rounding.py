"""Weights in float → whole numbers with a scale for each output channel, by least squares.

Without statistics every number goes to the nearest point of its grid. With the covariance C of the
layer's inputs the numbers are rounded one input after the other, and the inputs that follow make up
for the error: that lowers E|x (W - Ŵ)ᵀ|² = tr (W - Ŵ) C (W - Ŵ)ᵀ (Frantar et al., GPTQ, arXiv
2210.17323). The mean of the error goes into the bias.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from adacomcat.factorize.factors import LinearStatistics
from adacomcat.factorize.linalg import shrink
from adacomcat.ops.int8 import LEVELS, Int8Weight

SHRINKAGE = 0.01  # of the covariance; GPTQ's own
BLOCK = 128  # inputs whose errors are handed on together


class Rounded(NamedTuple):
    """A layer on int8."""

    weight: Int8Weight
    bias: Tensor | None  # (out,)


def round_linear(weight: Tensor, bias: Tensor | None,
                 statistics: LinearStatistics | None = None) -> Rounded:
    """x Wᵀ + b on int8 weights.

    Args:
        weight: W, (out, in).
        bias: b, (out,) or None; without one there is nothing to absorb the mean error, so that
            E[x xᵀ] takes the place of C.
        statistics: Of x.
    """
    weight = weight.double()
    largest = weight.abs().amax(1).float() / LEVELS
    scale = largest.where(largest > 0, 1)
    if statistics is None:
        return Rounded(_nearest(weight, scale), bias)
    if bias is None:
        statistics = statistics.about_zero()
    covariance = statistics.covariance.to(weight)
    found = _with_feedback(weight, scale, shrink(covariance, SHRINKAGE))
    if bias is not None:
        missing = (weight - found.dense.double()) @ statistics.mean.to(weight)
        bias = bias + missing.to(bias.dtype)
    return Rounded(found, bias)


def _nearest(weight: Tensor, scale: Tensor) -> Int8Weight:
    q = (weight / scale.unsqueeze(1)).round().clamp(-LEVELS, LEVELS)
    return Int8Weight(q.to(torch.int8), scale)


def _with_feedback(weight: Tensor, scale: Tensor, covariance: Tensor) -> Int8Weight:
    """With C⁻¹ = Tᵀ T, T upper triangular, an error e at input i adds -e T_ij / T_ii at j > i.

    Inputs of large variance come first, while many others can still make up for them.
    """
    order = covariance.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest, steps = weight[:, order], scale.double()
    q = torch.empty_like(rest)
    for start in range(0, rest.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, rest.shape[1]))
        errors = torch.empty_like(rest[:, block])
        for i in range(block.start, block.stop):
            q[:, i] = (rest[:, i] / steps).round().clamp(-LEVELS, LEVELS)
            error = (rest[:, i] - q[:, i] * steps) / upper[i, i]
            errors[:, i - start] = error
            rest[:, i:block.stop] -= torch.outer(error, upper[i, i:block.stop])
        rest[:, block.stop:] -= errors @ upper[block, block.stop:]
    return Int8Weight(q[:, order.argsort()].to(torch.int8), scale)
