"""A low-rank linear layer, drop-in for ``nn.Linear``."""

import math

import torch
from torch import Tensor, nn

from adacomcat import ops
from adacomcat.errors import UserError
from adacomcat.factorize.factors import LinearFactors, LinearStatistics, factorize_linear
from adacomcat.layers.inherit import inherit_
from adacomcat.layers.plain import is_plain_linear
from adacomcat.layers.stock import LinearPair, linear_of, refuse_scripting, weights_of


def require_rank(name: str, rank: object, full: int) -> None:
    """Raise a ``UserError`` unless ``rank`` is a whole number from 1 to ``full``."""
    if not (isinstance(rank, int) and 0 < rank <= full):
        raise UserError(f"{name} must lie in 1 … {full}, got {rank!r:.60}")


class LowRankLinear(nn.Module):
    """y = (x V) Uᵀ + b, equivalent to ``nn.Linear`` with weight U Vᵀ.

    It has fewer parameters and operations than the dense layer below rank in·out / (in + out). In
    the words of LoRA, A is Vᵀ and B is U.

    Args:
        in_features: Size of the last dimension of x (..., in).
        out_features: Size of the last dimension of y (..., out).
        rank: r, of ``v`` (in, r) and ``u`` (out, r).
        bias: Whether there is a ``bias`` (out,).
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True,
                 device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.v, self.u = empty(in_features, rank), empty(out_features, rank)
        self.bias = empty(out_features) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors as ``nn.Linear`` initialises weights, and a bias of zeros."""
        nn.init.kaiming_uniform_(self.v.T, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.u, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def like(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """A layer of ``linear``'s shape, device, dtype and mode; its factors are random.

        They train where ``linear``'s weight does.
        """
        made = cls(linear.in_features, linear.out_features, rank, linear.bias is not None,
                   linear.weight.device, linear.weight.dtype)
        inherit_(made, linear, {"v": linear.weight, "u": linear.weight, "bias": linear.bias})
        return made.train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, covariance: Tensor | None = None,
                    mean: Tensor | None = None) -> "LowRankLinear":
        """The best map of this rank: Ŵ = SVD_r(W C^½) C^-½, b̂ = b + (W - Ŵ) mean.

        It minimises E|y - ŷ|² over inputs of covariance C; without one, |W - Ŵ|. Where ``linear``
        has no bias to absorb the mean error, C + mean meanᵀ takes the place of C.

        Args:
            linear: The dense layer.
            rank: r.
            covariance: C, (in, in), the centred covariance of the inputs.
            mean: (in,), the mean of the inputs, zero by default; only read with a covariance.

        Raises:
            UserError: Something beside its weight and bias decides what ``linear`` computes, or
                the rank exceeds the full rank.
        """
        statistics = None
        if covariance is not None:
            mean = covariance.new_zeros(linear.in_features) if mean is None else mean
            statistics = LinearStatistics(mean, covariance, tokens=0)
        return cls.from_statistics(linear, rank, statistics)

    @classmethod
    def from_statistics(cls, linear: nn.Linear, rank: int,
                        statistics: LinearStatistics | None) -> "LowRankLinear":
        """``from_linear`` for the statistics of the inputs; None for the plain SVD."""
        if not is_plain_linear(linear):
            raise UserError(f"this {type(linear).__name__} is no plain nn.Linear: factors of its "
                            "weight leave out an adapter, a mask, a hook or a parametrization; "
                            "merge or remove these first")
        require_rank("rank", rank, min(linear.weight.shape))
        module = cls.like(linear, rank)
        bias = None if linear.bias is None else linear.bias.detach()
        if bias is None and statistics is not None:
            statistics = statistics.about_zero()
        module.set_(factorize_linear(linear.weight.detach(), bias, statistics))
        return module

    def to_linear(self) -> nn.Linear:
        """The dense layer of weight U Vᵀ."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None,
                           self.v.device, self.v.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        inherit_(linear, self, {"weight": self.v, "bias": self.bias})
        return linear.train(self.training)

    def to_plain(self) -> LinearPair:
        """The same factors in two layers of PyTorch's own."""
        pair = LinearPair(linear_of(self.v.T), linear_of(self.u, self.bias))
        return pair.train(self.training)

    @classmethod
    def from_plain(cls, pair: LinearPair) -> "LowRankLinear":
        """The factors of ``to_plain``.

        Raises:
            UserError: A layer of the pair is no plain linear layer any more.
        """
        (v, _), (u, bias) = map(weights_of, pair)
        made = cls(v.shape[1], len(u), len(v), bias is not None, v.device, v.dtype)
        made.v = nn.Parameter(v.detach().T.contiguous(), v.requires_grad)
        made.u, made.bias = nn.Parameter(u.detach(), u.requires_grad), bias
        return made.train(pair.training)

    __prepare_scriptable__ = refuse_scripting

    @torch.no_grad()
    def set_(self, factors: LinearFactors) -> None:
        """Take the first ``rank`` columns of the factors; a bias absorbs the mean error."""
        self.v.copy_(factors.v[:, :self.rank])
        self.u.copy_(factors.u[:, :self.rank])
        if self.bias is not None:
            self.bias.copy_(factors.truncated_bias(self.rank))

    @property
    def weight(self) -> Tensor:
        """U Vᵀ, (out, in), for code that reads ``linear.weight``; ``forward`` never forms it."""
        return self.u @ self.v.T

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        return ops.low_rank_linear(x, self.v, self.u, self.bias)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"rank={self.rank}, bias={self.bias is not None}")


def plain_linear(linear: nn.Module) -> nn.Module:
    """The plain form of a low-rank linear layer; another layer as it is."""
    return linear.to_plain() if isinstance(linear, LowRankLinear) else linear


def unplain_linear(linear: nn.Module) -> nn.Module:
    """What ``plain_linear`` was given."""
    return LowRankLinear.from_plain(linear) if isinstance(linear, LinearPair) else linear
