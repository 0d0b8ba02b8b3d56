"""Factors that are kept beside a model and cut to any rank later, without images.

They lie in float32; what is solved with them is solved in float64. Weights that the model itself
has are not kept a second time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from adacomcat.factorize.factors import ValueFactors
from adacomcat.factorize.linalg import ridge
from adacomcat.factorize.neurons import REFIT_SHRINKAGE, NeuronFactors


class NestedNeurons(NamedTuple):
    """Of an MLP's hidden neurons: those of a smaller width are among those of a larger one."""

    order: Tensor  # (H,) indices, the most valuable first
    mean: Tensor  # (H,) of the hidden activations
    covariance: Tensor  # (H, H)
    errors: Tensor  # (H + 1,)

    @classmethod
    def of(cls, factors: NeuronFactors) -> "NestedNeurons":
        return cls(factors.order, factors.mean.float(), factors.covariance.float(), factors.errors)

    def pruned(self, width: int, weight: Tensor,
               bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(kept neurons (width,), weight (out, width), bias (out,)) of the second projection, from
        the dense ``weight`` (out, H) and ``bias``."""
        weight = weight.double()
        bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
        return NeuronFactors(self.order, weight, bias, self.mean.double(),
                             self.covariance.double(), self.errors).nested(width)


class NestedValues(NamedTuple):
    """Of the value path of an attention, with what fits the outputs of all heads at once."""

    wv: Tensor  # (H, R, d)
    wo: Tensor  # (H, out, R)
    bo: Tensor  # (out,)
    mean: Tensor  # (H, d) of the averaged tokens
    covariance: Tensor  # (H·r, H·r) of the averaged dense values of all heads
    errors: Tensor  # (R + 1,)

    @classmethod
    def of(cls, factors: ValueFactors, covariance: Tensor) -> "NestedValues":
        kept = (factors.wv, factors.wo, factors.bo, factors.mean, covariance)
        return cls(*(tensor.float() for tensor in kept), factors.errors)

    def cut(self, rank: int, wv: Tensor, wo: Tensor) -> ValueFactors:
        """The factors of this rank alone, from the dense wv (H, r, d) and wo (H, out, r).

        With values a of all heads, those of the cut factors are T a, and the outputs
        U = argmin E|(Wo - U T) a|² + λ m |U - U0|², U0 the cut wo, m the mean variance of T a.
        A head so takes over what others lose.
        """
        wv, wo = wv.double(), wo.double()
        inner, outer = self.wv[:, :rank].double(), self.wo[..., :rank].double()
        mixing = coordinates(inner, wv)  # T
        dense, start = _side_by_side(wo), _side_by_side(outer)  # Wo, U0
        seen = self.covariance.double() @ mixing.mT
        metric = mixing @ seen
        pull = ridge(metric, REFIT_SHRINKAGE) * torch.eye(len(metric)).to(metric)
        lower = torch.linalg.cholesky(metric + pull)
        fitted = start + torch.cholesky_solve((dense @ seen - start @ metric).mT, lower).mT
        mean = torch.einsum("hrd,hd->hr", wv, self.mean.double()).flatten()
        bias = self.bo.double() + (dense - fitted @ mixing) @ mean
        outputs = fitted.unflatten(1, (len(wo), -1)).transpose(0, 1)
        return ValueFactors(inner, outputs, bias, self.mean.double(), self.errors[:rank + 1])


def _side_by_side(wo: Tensor) -> Tensor:
    """(H, out, r) → (out, H·r)"""
    return wo.transpose(0, 1).flatten(1)


def coordinates(cut: Tensor, wv: Tensor) -> Tensor:
    """(H·n, H·r), block by block T_h with cut_h = T_h wv_h, for cut (H, n, d) and wv (H, r, d)."""
    gram = torch.linalg.pinv(wv @ wv.mT, hermitian=True)
    return torch.block_diag(*(cut @ wv.mT @ gram))
