"""Low-rank linear layers and MLPs, drop-in for ``nn.Linear`` and timm's ``Mlp``."""

import math

import torch
from timm.layers import GELU, GELUTanh
from torch import Tensor, nn

from adacomcat import ops
from adacomcat.factorize import LinearFactors, LinearStatistics, factorize_linear

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


def activation_name(module: nn.Module) -> str | None:
    """The name by which the fused ops know an activation; None where they do not."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module))


class LowRankMlp(nn.Module):
    """y = fc2(act(fc1(x))) with low-rank fc1 and fc2 in one op: the hidden layer stays on chip.

    State-dict keys are those of timm's ``Mlp`` with ``LowRankLinear`` inside.
    """

    def __init__(self, fc1: LowRankLinear, act: nn.Module, fc2: LowRankLinear,
                 drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, act, fc2
        self.drop1, self.drop2 = nn.Dropout(drop), nn.Dropout(drop)
        self.activation = activation_name(act)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None and not (self.training and self.drop1.p):
            y = ops.low_rank_mlp(x, self.fc1.v, self.fc1.u, self.fc1.bias,
                                 self.fc2.v, self.fc2.u, self.fc2.bias, self.activation)
        else:
            y = self.fc2(self.drop1(self.act(self.fc1(x))))
        return self.drop2(y)
