"""MLPs with low-rank projections or with fewer hidden neurons, drop-in for timm's ``Mlp``."""

import copy
from typing import Any, cast

import torch
from timm.layers import GELU, GELUTanh, QuickGELU
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from adacomcat import ops
from adacomcat.errors import UserError
from adacomcat.factorize.factors import LinearStatistics
from adacomcat.layers.inherit import inherit_
from adacomcat.layers.linear import LowRankLinear, plain_linear, require_rank
from adacomcat.layers.plain import altered, is_plain, is_plain_linear
from adacomcat.layers.registry import MlpParts, mlp_parts
from adacomcat.layers.stock import refuse_scripting

_ACTIVATIONS: dict[type[nn.Module], str | None] = {
    nn.ReLU: "relu", nn.SiLU: "silu", GELU: "gelu", GELUTanh: "gelu_tanh",
    QuickGELU: "quick_gelu"}


def add_activation(kind: type[nn.Module], name: str | None = None) -> None:
    """Say that ``kind`` works element by element, and by which name the ops know it."""
    _ACTIVATIONS[kind] = name


def is_elementwise(module: nn.Module) -> bool:
    """Whether ``module`` is an activation that is known to mix no neurons."""
    return type(module) is nn.GELU or type(module) in _ACTIVATIONS


def mlp_of_width(mlp: nn.Module, width: int) -> nn.Module:
    """A module like ``mlp`` with this many hidden neurons; its weights are random.

    It is of the same class, and shares all but the projections with ``mlp``.
    """
    parts = _dense_parts(mlp)
    fc1, fc2 = parts.linears
    device, dtype = fc1.weight.device, fc1.weight.dtype
    made = copy.copy(mlp)
    vars(made).update({name: value.copy() for name, value in vars(mlp).items()
                       if isinstance(value, dict)})
    narrow = (nn.Linear(fc1.in_features, width, fc1.bias is not None, device, dtype),
              nn.Linear(width, fc2.out_features, fc2.bias is not None, device, dtype))
    for name, linear in zip(parts.names, narrow, strict=True):
        setattr(made, name, linear.train(mlp.training))
    inherit_(made, mlp, dict(mlp.named_parameters()))
    return made


@torch.no_grad()
def prune_mlp(mlp: nn.Module, kept: Tensor, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of ``mlp`` with the ``kept`` hidden neurons only, and this second projection.

    Args:
        mlp: The dense MLP, of a class that a family knows.
        kept: (width,), indices of the neurons.
        weight: (out, width), the refitted weight of ``fc2``.
        bias: (out,), its bias; left out where ``fc2`` has none.
    """
    made = mlp_of_width(mlp, len(kept))
    (dense, _), (fc1, fc2) = _dense_parts(mlp).linears, _dense_parts(made).linears
    fc1.weight.copy_(dense.weight[kept])
    if dense.bias is not None:
        fc1.bias.copy_(dense.bias[kept])
    fc2.weight.copy_(weight)
    if fc2.bias is not None:
        fc2.bias.copy_(bias)
    return made


def _dense_parts(mlp: nn.Module) -> MlpParts:
    parts = mlp_parts(mlp)
    assert parts is not None, "only known MLPs lose neurons"
    return parts


def _projections(mlp: Mlp) -> tuple[nn.Linear, nn.Linear]:
    """fc1 and fc2; timm declares that they may be convolutions too."""
    return cast(nn.Linear, mlp.fc1), cast(nn.Linear, mlp.fc2)


def activation_name(module: nn.Module) -> str | None:
    """The name by which the fused ops know an activation; None where they do not."""
    return None if altered(module) else _name(module)


def _name(module: nn.Module) -> str | None:
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

    @property
    def parts(self) -> MlpParts:
        """Both projections and what stands between."""
        return MlpParts(self.fc1, self.act, self.fc2, self.drop1.p, plain=True)

    @property
    def activation(self) -> str | None:
        """The name by which the op knows ``act``; None where it does not."""
        return _name(self.act)

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
        if not (isinstance(mlp, Mlp) and is_plain(mlp, Mlp) and is_plain(mlp.norm, nn.Identity)
                and is_plain_linear(mlp.fc1) and is_plain_linear(mlp.fc2)):
            raise UserError(f"{type(mlp).__name__} is not timm's Mlp of two linear layers without "
                            "a norm; use adacomcat.compress")
        dense1, dense2 = _projections(mlp)
        fc1 = _low_rank(dense1, rank1, statistics1, "rank1")
        fc2 = _low_rank(dense2, rank2, statistics2, "rank2")
        return cls(fc1, mlp.act, fc2, getattr(mlp.drop1, "p", 0.0)).train(mlp.training)

    def to_plain(self) -> Mlp:
        """timm's ``Mlp`` of the same factors."""
        made: Any = Mlp(1, device=torch.device("meta"))
        for name in ("act", "drop1", "drop2"):
            setattr(made, name, getattr(self, name))
        made.fc1 = plain_linear(self.fc1)
        made.fc2 = plain_linear(self.fc2)
        return made.train(self.training)

    __prepare_scriptable__ = refuse_scripting

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        activation = _name(act)
        whole = (activation is not None and type(fc1) is type(fc2) is LowRankLinear
                 and not (_hooked(fc1) or _hooked(act) or _hooked(fc2)))
        if whole and not (self.training and self.drop1.p):
            y = ops.low_rank_mlp(x, fc1.v, fc1.u, fc1.bias, fc2.v, fc2.u, fc2.bias, activation)
        else:
            y = fc2(self.drop1(act(fc1(x))))
        return self.drop2(y)


def _hooked(module: nn.Module) -> bool:
    """A part of ``layers.plain.altered`` that is quick enough for every call."""
    return bool(module._forward_hooks or module._forward_pre_hooks
                or "forward" in module.__dict__)


def _low_rank(linear: nn.Linear, rank: int | None, statistics: LinearStatistics | None,
              name: str) -> LowRankLinear:
    full = min(linear.in_features, linear.out_features)
    rank = full if rank is None else rank
    require_rank(name, rank, full)
    return LowRankLinear.from_statistics(linear, rank, statistics)
