"""Which hidden neurons of an MLP stay, and what its second projection becomes without the others.

Through the activation only a choice of coordinates passes, so the low-rank form of a whole MLP is
a column subset: y = act(x W1ᵀ + b1) W2ᵀ ≈ act(x W1ᵀ + b1)_K W_Kᵀ. With rows of the hidden
covariance C, the best W_K for a kept set K is the regression of W2 h on h_K. K comes by elimination
in blocks, least loss first, each time refitting the rest (Hassibi and Stork, Optimal Brain Surgeon,
1993; for the MLPs of language models: MoDeGPT, arXiv 2408.09632). Measured on DINOv2 ViT-S
(examples/dinov2): half the error, on other photographs, of two low-rank projections of equal size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adacomcat.factorize.factors import LinearStatistics
from adacomcat.factorize.linalg import shrink

# Of the refit towards the dense weights; ten times as much was no better (examples/dinov2).
SHRINKAGE = 0.01
# Neurons leave in at most this many rounds; losses are exact at their ends, linear in between.
ROUNDS = 48


@dataclass
class HiddenFactors:
    """Neurons in the order of their worth. ``errors[n]`` is E|y - ŷ|² with n of them, n = 0 … H."""

    order: Tensor  # (H,) indices
    weight: Tensor  # (out, H) of the dense second projection
    bias: Tensor  # (out,)
    mean: Tensor  # (H,) of the hidden activations
    covariance: Tensor  # (H, H)
    errors: Tensor  # (H + 1,)

    @property
    def triangle(self) -> Tensor:
        """Lower L, L Lᵀ the neurons' shrunk covariance in their order. W L 1_{j ≤ n} L⁻¹ is the
        regression of W h on the first n neurons: with L, refits of every width are prefixes."""
        ordered = self.covariance[self.order][:, self.order]
        return torch.linalg.cholesky(shrink(ordered, SHRINKAGE))

    def kept(self, width: int) -> Tensor:
        return self.order[:width].sort().values

    def narrowed(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """(kept neurons (width,), weight (out, width), bias (out,))."""
        kept = self.kept(width)
        weight = refitted(self.weight, self.covariance, kept)
        return kept, weight, self.bias + self.weight @ self.mean - weight @ self.mean[kept]


def factorize_hidden(weight: Tensor, bias: Tensor | None,
                     statistics: LinearStatistics) -> HiddenFactors:
    """weight (out, H) and the statistics of what enters it."""
    weight = weight.double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    mean, covariance = statistics.mean.double(), statistics.covariance.double()
    order, errors = eliminate(weight, shrink(covariance, SHRINKAGE))
    return HiddenFactors(order, weight, bias, mean, covariance, errors)


def refitted(weight: Tensor, covariance: Tensor, kept: Tensor) -> Tensor:
    """W_K = argmin E|W h - W_K h_K|² + λ m |W_K - W[:, K]|², m the mean variance; (out, K)."""
    own = covariance[kept][:, kept]
    pull = SHRINKAGE * own.diagonal().mean()
    target = covariance[kept] @ weight.mT + pull * weight[:, kept].mT
    return torch.cholesky_solve(target, torch.linalg.cholesky(shrink(own, SHRINKAGE))).mT


def eliminate(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(order, errors): neurons, the first to go last, and the loss tr(ΔW C ΔWᵀ) of every width.

    Removing the set S costs tr(W_S [(C⁻¹)_SS]⁻¹ W_Sᵀ) once the rest is refitted; within a round
    the single losses |w_j|² / (C⁻¹)_jj choose S.
    """
    hidden = weight.shape[1]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    alive = torch.arange(hidden, device=weight.device)
    errors, gone = weight.new_zeros(hidden + 1), []
    for count in _rounds(hidden):
        single = weight.square().sum(0) / inverse.diagonal()
        leaving = single.argsort(stable=True)[:count]
        stays = torch.ones_like(alive, dtype=torch.bool).index_fill_(0, leaving, False)
        lower = torch.linalg.cholesky(inverse[leaving][:, leaving])
        removal = torch.cholesky_solve(inverse[leaving], lower)
        lost = torch.linalg.solve_triangular(lower, weight[:, leaving].mT, upper=False)
        before, after = len(alive), len(alive) - count
        errors[after:before] = errors[before] + lost.square().sum() * torch.linspace(
            1, 1 / count, count, dtype=errors.dtype, device=errors.device)
        weight = (weight - weight[:, leaving] @ removal)[:, stays]
        inverse = (inverse - inverse[:, leaving] @ removal)[stays][:, stays]
        gone.append(alive[leaving])
        alive = alive[stays]
    return torch.cat(gone).flip(0), errors


def _rounds(hidden: int) -> list[int]:
    """Sizes of the rounds, together all neurons."""
    size = -(-hidden // ROUNDS)
    return [min(size, hidden - start) for start in range(0, hidden, size)]
