"""MLPs with low-rank projections or with fewer hidden neurons, drop-in for timm's ``Mlp``."""

from typing import cast

import torch
from timm.layers import GELU, GELUTanh
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from adacomcat import ops
from adacomcat.errors import UserError
from adacomcat.factorize.factors import LinearStatistics
from adacomcat.layers.linear import LowRankLinear

_ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu", GELU: "gelu", GELUTanh: "gelu_tanh"}


def mlp_of_width(mlp: Mlp, width: int) -> Mlp:
    """A timm MLP like ``mlp`` with this many hidden neurons; its weights are random."""
    fc1, fc2 = _projections(mlp)
    device, dtype = fc1.weight.device, fc1.weight.dtype
    made = Mlp(fc1.in_features, width, fc2.out_features, drop=(mlp.drop1.p, mlp.drop2.p),
               device=device, dtype=dtype)
    made.act = mlp.act
    made.fc1 = nn.Linear(fc1.in_features, width, fc1.bias is not None, device, dtype)
    made.fc2 = nn.Linear(width, fc2.out_features, fc2.bias is not None, device, dtype)
    return made.train(mlp.training)


@torch.no_grad()
def prune_mlp(mlp: Mlp, kept: Tensor, weight: Tensor, bias: Tensor) -> Mlp:
    """A copy of ``mlp`` with the ``kept`` hidden neurons only, and this second projection.

    Args:
        mlp: The dense MLP.
        kept: (width,), indices of the neurons.
        weight: (out, width), the refitted weight of ``fc2``.
        bias: (out,), its bias; left out where ``fc2`` has none.
    """
    made = mlp_of_width(mlp, len(kept))
    (dense, _), (fc1, fc2) = _projections(mlp), _projections(made)
    fc1.weight.copy_(dense.weight[kept])
    if dense.bias is not None:
        fc1.bias.copy_(dense.bias[kept])
    fc2.weight.copy_(weight)
    if fc2.bias is not None:
        fc2.bias.copy_(bias)
    return made


def _projections(mlp: Mlp) -> tuple[nn.Linear, nn.Linear]:
    """fc1 and fc2; timm declares that they may be convolutions too."""
    return cast(nn.Linear, mlp.fc1), cast(nn.Linear, mlp.fc2)


def activation_name(module: nn.Module) -> str | None:
    """The name by which the fused ops know an activation; None where they do not."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module))


class LowRankMlp(nn.Module):
    """y = fc2(act(fc1(x))) with low-rank fc1 and fc2 in one op: the hidden layer stays on chip.

    State-dict keys are those of timm's ``Mlp`` with ``LowRankLinear`` inside.

    Args:
        fc1: The first projection, (..., in) → (..., hidden).
        act: The activation; GELU (exact or tanh), SiLU and ReLU run in the op.
        fc2: The second projection, (..., hidden) → (..., out).
        drop: Dropout after the activation and after fc2, in training.
    """

    def __init__(self, fc1: LowRankLinear, act: nn.Module, fc2: LowRankLinear,
                 drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, act, fc2
        self.drop1, self.drop2 = nn.Dropout(drop), nn.Dropout(drop)
        self.activation = activation_name(act)

    @classmethod
    def from_timm(cls, mlp: nn.Module, rank1: int | None = None, rank2: int | None = None, *,
                  statistics1: LinearStatistics | None = None,
                  statistics2: LinearStatistics | None = None) -> "LowRankMlp":
        """Both projections of a timm ``Mlp``, each by the best map of its rank.

        Each projection is factorised as by ``LowRankLinear.from_linear``: by the plain SVD of its
        weight, or with statistics of its inputs by the whitened one, W C^½.

        Args:
            mlp: timm's ``Mlp`` with two linear layers and no norm in between.
            rank1: Rank of fc1; the full rank min(in, hidden) by default.
            rank2: Rank of fc2; the full rank min(hidden, out) by default.
            statistics1: Mean (in,) and centred covariance (in, in) of the inputs of fc1.
            statistics2: Mean (hidden,) and centred covariance (hidden, hidden) of the inputs of
                fc2, which are the hidden activations.

        Raises:
            UserError: ``mlp`` is no such MLP, or a rank exceeds the full rank.
        """
        if not (type(mlp) is Mlp and type(mlp.fc1) is type(mlp.fc2) is nn.Linear
                and isinstance(mlp.norm, nn.Identity)):
            raise UserError(f"{type(mlp).__name__} is not timm's Mlp of two linear layers without "
                            "a norm; use adacomcat.compress")
        dense1, dense2 = _projections(mlp)
        fc1 = _low_rank(dense1, rank1, statistics1, "rank1")
        fc2 = _low_rank(dense2, rank2, statistics2, "rank2")
        return cls(fc1, mlp.act, fc2, mlp.drop1.p).train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        if self.activation is not None and not (self.training and self.drop1.p):
            y = ops.low_rank_mlp(x, self.fc1.v, self.fc1.u, self.fc1.bias,
                                 self.fc2.v, self.fc2.u, self.fc2.bias, self.activation)
        else:
            y = self.fc2(self.drop1(self.act(self.fc1(x))))
        return self.drop2(y)


def _low_rank(linear: nn.Linear, rank: int | None, statistics: LinearStatistics | None,
              name: str) -> LowRankLinear:
    full = min(linear.in_features, linear.out_features)
    rank = full if rank is None else rank
    if not 0 < rank <= full:
        raise UserError(f"{name} must lie in 1 … {full}, got {rank}")
    return LowRankLinear.from_statistics(linear, rank, statistics)
