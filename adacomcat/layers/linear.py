"""Low-rank linear layers and MLPs, drop-in for ``nn.Linear`` and timm's ``Mlp``."""

import math

import torch
from timm.layers import GELU, GELUTanh
from torch import Tensor, nn

from adacomcat import ops
from adacomcat.factorize.factors import LinearFactors, LinearStatistics, factorize_linear

_ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu", GELU: "gelu", GELUTanh: "gelu_tanh"}


class LowRankLinear(nn.Module):
    """y = (x V) Uᵀ + b, with v: (in, rank), u: (out, rank). LoRA's A is Vᵀ, its B is U.

    Pays below rank in·out / (in + out). Equivalent to ``nn.Linear`` with weight U Vᵀ.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True,
                 device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.v = nn.Parameter(torch.empty(in_features, rank, **kwargs))
        self.u = nn.Parameter(torch.empty(out_features, rank, **kwargs))
        self.bias = nn.Parameter(torch.empty(out_features, **kwargs)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.v.T, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.u, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def like(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """Uninitialised, of ``linear``'s shape."""
        return cls(linear.in_features, linear.out_features, rank, linear.bias is not None,
                   linear.weight.device, linear.weight.dtype).train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, covariance: Tensor | None = None,
                    mean: Tensor | None = None) -> "LowRankLinear":
        """The best rank-``rank`` map for inputs of this centred covariance (in, in) and mean."""
        statistics = None
        if covariance is not None:
            mean = covariance.new_zeros(linear.in_features) if mean is None else mean
            statistics = LinearStatistics(mean, covariance, tokens=0)
        module = cls.like(linear, rank)
        module.set_(factorize_linear(linear.weight.detach(), _bias(linear), statistics))
        return module

    def to_linear(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None,
                           self.v.device, self.v.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    @torch.no_grad()
    def set_(self, factors: LinearFactors) -> None:
        """Take the first ``rank`` columns; where there is a bias it absorbs the mean error."""
        self.v.copy_(factors.v[:, :self.rank])
        self.u.copy_(factors.u[:, :self.rank])
        if self.bias is not None:
            self.bias.copy_(factors.truncated_bias(self.rank))

    @property
    def weight(self) -> Tensor:
        """U Vᵀ, for code that reads ``linear.weight``; forward never forms it."""
        return self.u @ self.v.T

    def forward(self, x: Tensor) -> Tensor:
        return ops.low_rank_linear(x, self.v, self.u, self.bias)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"rank={self.rank}, bias={self.bias is not None}")


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()
