"""Pruning of an MLP's hidden neurons, and the refit of its second projection.

The activation lets only a choice of coordinates pass, so the low-rank form of a whole MLP is a
column subset: y = act(x W1ᵀ + b1) W2ᵀ ≈ act(x W1ᵀ + b1)_K W_Kᵀ. For kept neurons K the best W_K is
the regression of W2 h on h_K, by the covariance C of the hidden activations h. Neurons are
eliminated in blocks, those of least loss first, and the rest is refitted each time (Hassibi and
Stork, Optimal Brain Surgeon, 1993; for the MLPs of language models MoDeGPT, arXiv 2408.09632). An
MLP that is cut to one width then exchanges kept neurons for eliminated ones while that helps. On
DINOv2 ViT-S and photographs outside of the calibration (examples/dinov2), pruned MLPs had half the
relative error of the features that two low-rank projections of equal size had.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adacomcat.factorize.factors import LinearStatistics
from adacomcat.factorize.linalg import ridge, shrink

# Shrinkage of a refit towards the dense weights, as a part of the mean variance; ten times as much
# gave no smaller error of the features (examples/dinov2).
REFIT_SHRINKAGE = 0.01
# The most rounds of elimination. Losses are exact at the ends of rounds and linear in between.
ELIMINATION_ROUNDS = 48
# Exchanges stop where the best one saves less than this part of the loss, or after so many.
LEAST_GAIN = 1e-3
MOST_EXCHANGES = 64


@dataclass
class NeuronFactors:
    """Hidden neurons, the most valuable first. ``errors[n]`` is E|y - ŷ|² with the first n of them,
    n = 0 … H."""

    order: Tensor  # (H,) indices
    weight: Tensor  # (out, H) of the dense second projection
    bias: Tensor  # (out,)
    mean: Tensor  # (H,) of the hidden activations
    covariance: Tensor  # (H, H)
    errors: Tensor  # (H + 1,)

    @property
    def triangle(self) -> Tensor:
        """Lower L with L Lᵀ the shrunk covariance of the neurons in their order. W L 1_{j ≤ n} L⁻¹
        is the regression of W h on the first n neurons: with L, refits of all widths are nested."""
        ordered = self.covariance[self.order][:, self.order]
        return torch.linalg.cholesky(shrink(ordered, REFIT_SHRINKAGE))

    def kept(self, width: int) -> Tensor:
        """The neurons of an MLP of this width alone: no other width needs to nest in it."""
        return exchange(self.weight, shrink(self.covariance, REFIT_SHRINKAGE), self.order[:width])

    def pruned(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """(kept neurons (width,), weight (out, width), bias (out,))."""
        return self._refitted(self.kept(width))

    def nested(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the first neurons in the order: those of a smaller width are among them,
        and nothing is exchanged, which takes most of the time of ``pruned``."""
        return self._refitted(self.order[:width].sort().values)

    def _refitted(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = refitted(self.weight, self.covariance, kept)
        return kept, weight, self.bias + self.weight @ self.mean - weight @ self.mean[kept]


def factorize_neurons(weight: Tensor, bias: Tensor | None,
                      statistics: LinearStatistics) -> NeuronFactors:
    """The order of the neurons that enter a second projection, and the loss of every width.

    Args:
        weight: (out, H) of the projection.
        bias: (out,) or None.
        statistics: Mean and covariance of the hidden activations.
    """
    weight = weight.double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    mean, covariance = statistics.mean.double(), statistics.covariance.double()
    order, errors = eliminate(weight, shrink(covariance, REFIT_SHRINKAGE))
    return NeuronFactors(order, weight, bias, mean, covariance, errors)


def refitted(weight: Tensor, covariance: Tensor, kept: Tensor) -> Tensor:
    """W_K = argmin E|W h - W_K h_K|² + λ m |W_K - W[:, K]|², m the mean variance; (out, K)."""
    own = covariance[kept][:, kept]
    target = covariance[kept] @ weight.mT + ridge(own, REFIT_SHRINKAGE) * weight[:, kept].mT
    return torch.cholesky_solve(target, torch.linalg.cholesky(shrink(own, REFIT_SHRINKAGE))).mT


def eliminate(weight: Tensor, covariance: Tensor, width: int = 0) -> tuple[Tensor, Tensor]:
    """(order, errors): neurons, last eliminated first, and the loss tr(ΔW C ΔWᵀ) of every width.

    The removal of a set S costs tr(W_S [(C⁻¹)_SS]⁻¹ W_Sᵀ) once the rest is refitted. A round
    removes the neurons of the least single losses |w_j|² / (C⁻¹)_jj. This is a pivoted Cholesky
    decomposition of C⁻¹ in blocks: what the rounds so far took from C⁻¹ is FᵀF, and a round forms
    those rows of the rest alone that it removes.

    Args:
        weight: (out, H).
        covariance: C, (H, H).
        width: where to stop. The first so many of ``order`` are those that are left, and
            ``errors`` holds below that width the error of that width.
    """
    hidden = weight.shape[1]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    factor = inverse.new_empty(hidden - width, hidden)  # F
    spared, variance = weight.clone(), inverse.diagonal().clone()
    alive = torch.ones(hidden, dtype=torch.bool, device=weight.device)
    errors, gone, done = weight.new_zeros(hidden + 1), [], 0
    for count in _rounds(hidden, hidden - width):
        single = torch.where(alive, spared.square().sum(0) / variance, math.inf)
        leaving = single.argsort(stable=True)[:count]
        rows = inverse[leaving].addmm_(factor[:done, leaving].mT, factor[:done], alpha=-1)
        lower = torch.linalg.cholesky(rows[:, leaving])
        rows = torch.linalg.solve_triangular(lower, rows, upper=False)
        lost = torch.linalg.solve_triangular(lower, spared[:, leaving].mT, upper=False)
        errors[hidden - done - count:hidden - done] = (
            errors[hidden - done] + lost.square().sum() * torch.linspace(
                1, 1 / count, count, dtype=errors.dtype, device=errors.device))
        spared.addmm_(lost.mT, rows, alpha=-1)
        variance -= rows.square().sum(0)
        factor[done:done + count] = rows
        done += count
        alive[leaving] = False
        gone.append(leaving)
    errors[:width] = errors[width]
    return torch.cat([*gone, alive.nonzero().squeeze(1)]).flip(0), errors


def exchange(weight: Tensor, covariance: Tensor, kept: Tensor) -> Tensor:
    """Kept neurons exchanged for others, one pair at a time, the pair that saves the most.

    With P = C_KK⁻¹, the regression B = C_DK P of the other neurons D on the kept ones, its residual
    variances s, the refit U = W_K + W_D B and the covariances G of what it leaves with D, giving up
    i for j changes the loss by |u_i|²/P_ii - |g_j + u_i B_ji/P_ii|² / (s_j + B_ji²/P_ii).

    Args:
        weight: (out, H).
        covariance: C, (H, H).
        kept: (n,) where to start.

    Returns:
        (n,), ascending.
    """
    kept = kept.sort().values
    for _ in range(MOST_EXCHANGES):
        stays = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        others = (~stays.index_fill(0, kept, True)).nonzero().squeeze(1)
        if not (len(kept) and len(others)):
            return kept
        saved, loss, (i, j) = _best_exchange(weight, covariance, kept, others)
        if saved <= LEAST_GAIN * loss:
            return kept
        kept = torch.cat([kept[:i], kept[i + 1:], others[j:j + 1]]).sort().values
    return kept


def _best_exchange(weight: Tensor, covariance: Tensor, kept: Tensor,
                   others: Tensor) -> tuple[float, float, tuple[int, int]]:
    """(what the best exchange saves, the loss before it, its places in ``kept`` and ``others``)."""
    across = covariance[others][:, kept]
    precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance[kept][:, kept]))
    regression = across @ precision  # (D, K)
    dropped = weight[:, others]
    refit = weight[:, kept] + dropped @ regression
    left = dropped @ covariance[others][:, others] - (dropped @ regression) @ across.mT  # (out, D)
    variances = covariance.diagonal()[others] - (regression * across).sum(1)
    passed = regression / precision.diagonal()
    energy = refit.square().sum(0)
    gained = (left.square().sum(0)[:, None] + 2 * passed * (left.mT @ refit)
              + passed.square() * energy) / (variances[:, None] + passed * regression)
    saved = gained - energy / precision.diagonal()
    j, i = divmod(int(saved.argmax()), len(kept))
    return saved[j, i].item(), (left * dropped).sum().item(), (i, j)


def _rounds(hidden: int, leaving: int) -> list[int]:
    """Sizes of the rounds; their sum is ``leaving``."""
    size = -(-hidden // ELIMINATION_ROUNDS)
    return [min(size, leaving - start) for start in range(0, leaving, size)]
