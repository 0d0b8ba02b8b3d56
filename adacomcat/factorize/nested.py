"""What is kept of an MLP's neurons beside a model, and cut to any width later, without images."""

from typing import NamedTuple

from torch import Tensor

from adacomcat.factorize.neurons import NeuronFactors


class NestedNeurons(NamedTuple):
    """Hidden neurons in float32, those of a smaller width among those of a larger one. The weights
    that they belong to are the model's."""

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
