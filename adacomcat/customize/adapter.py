"""Low-rank products beside an attention, head by head: one attention whose heads are r wider.

With tokens x, context c, and per head the frozen W and the trained U, S of an adapter:

    logits = s (x Wq Wkᵀ cᵀ + α² x Uq Skᵀ cᵀ) = s [x Wq | α x Uq] [c Wk | α c Sk]ᵀ
    out    = P c (Wv Wo + α² Uv So)           = P [c Wv | α² c Uv] [Wo; So]

P is the softmax of the logits and s the scale of the frozen attention. Several adapters widen the
heads side by side.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.layers.linear import LowRankLinear

Linear = nn.Linear | LowRankLinear  # dense, or compressed
# Kinds of tokens: what every attention has, and the text in a joint attention.
TOKENS, TEXT = "tokens", "text"


class Projections(NamedTuple):
    """The frozen projections of one kind of tokens: of pictures, or of a joint attention's text."""

    q: Linear
    k: Linear
    v: Linear
    out: Linear | None  # None: nothing reads what these tokens become


class Adapter(nn.Module):
    """The factors of one adapter beside ``Projections``; rows of a head stand together.

    q (H·r, query width), k and v (H·r, context width), o (output width, H·r). q and k are None
    where only values are adapted, and o is None where the projections have no output.

    Args:
        frozen: the projections.
        heads: the number of heads H.
        rank: r, the columns that each head gets.
        queries: whether queries and keys are adapted, too.
    """

    def __init__(self, frozen: Projections, heads: int, rank: int, queries: bool) -> None:
        super().__init__()
        self.heads, self.rank = heads, rank
        like, rows = frozen.v.weight, heads * rank

        def factor(*shape: int) -> nn.Parameter:
            # Factors train in single precision beside weights in half precision.
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=like.device))

        self.q = factor(rows, frozen.q.in_features) if queries else None
        self.k = factor(rows, frozen.k.in_features) if queries else None
        self.v = factor(rows, frozen.v.in_features)
        self.o = None if frozen.out is None else factor(frozen.out.out_features, rows)
        self._changing: object = None  # versions of k and o that were not all zero

    @torch.no_grad()
    def init_(self, init: str, generator: torch.Generator | None = None) -> None:
        """Draw the factors.

        Args:
            init: 'linear', the published start, draws each like the weight of an nn.Linear, which
                moves the output. 'zero' then clears k and o, which keeps it.
            generator: of the random numbers, on the CPU.
        """
        for name, factor in self.named_parameters():
            if init == "zero" and name in ("k", "o"):
                factor.zero_()
            else:
                bound = 1 / math.sqrt(factor.shape[1])
                drawn = torch.empty(factor.shape).uniform_(-bound, bound, generator=generator)
                factor.copy_(drawn)

    def changes_nothing(self) -> bool:
        """Whether k and o are all zero.

        Only the answer no is kept until they are written again: writes through ``.data`` leave a
        version as it is, and a yes that is out of date would switch the adapter off.
        """
        if torch.compiler.is_compiling():
            return False
        factors = [factor for factor in (self.k, self.o) if factor is not None]
        versions = [(factor.data_ptr(), factor._version) for factor in factors]
        if self._changing == versions:
            return False
        if any(bool(factor.any()) for factor in factors):
            self._changing = versions
            return False
        return True


Active = Sequence[tuple[Adapter, float]]  # adapters with their α


class AdapterStack(nn.Module):
    """The adapters beside one attention, by name, with their α."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()  # name → kind of tokens → Adapter
        self.alphas: dict[str, float] = {}

    def active(self, tokens: str) -> Active:
        """The adapters of one kind of tokens that change something."""
        return [(self.of(name, tokens), alpha) for name, alpha in self.alphas.items()
                if alpha and (torch.is_grad_enabled() or not self._changes_nothing(name))]

    def _changes_nothing(self, name: str) -> bool:
        parts = self.adapters[name]
        assert isinstance(parts, nn.ModuleDict)
        return all(self.of(name, tokens).changes_nothing() for tokens in parts)

    def of(self, name: str, tokens: str) -> Adapter:
        found = self.adapters[name]
        assert isinstance(found, nn.ModuleDict)
        adapter = found[tokens]
        assert isinstance(adapter, Adapter)
        return adapter


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, L, H·d) → (B, H, L, d)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def _product(tokens: Tensor, factor: Tensor) -> Tensor:
    return F.linear(tokens, factor.to(tokens.dtype))


def _beside(heads: Tensor, products: Sequence[Tensor]) -> Tensor:
    """``heads`` (B, H, L, d) and products (B, L, H·r) side by side: (B, H, L, d + Σr)."""
    return torch.cat([heads, *(split_heads(part, heads.shape[1]) for part in products)], -1)


def widen_queries(heads: Tensor, tokens: Tensor, active: Active) -> Tensor:
    """[q | α x Uq] of each head; zeros where queries are not adapted.

    Args:
        heads: the frozen queries (B, H, L, d).
        tokens: x (B, L, width).
        active: the adapters.
    """
    return _widened(heads, tokens, active, "q")


def widen_keys(heads: Tensor, context: Tensor, active: Active) -> Tensor:
    """[k | α c Sk] of each head; see ``widen_queries``."""
    return _widened(heads, context, active, "k")


def _widened(heads: Tensor, tokens: Tensor, active: Active, name: str) -> Tensor:
    if all(getattr(adapter, name) is None for adapter, _ in active):
        return F.pad(heads, (0, sum(adapter.rank for adapter, _ in active)))
    return _beside(heads, [alpha * _product(tokens, getattr(adapter, name))
                           for adapter, alpha in active])


def widen_values(heads: Tensor, context: Tensor, active: Active) -> Tensor:
    """[v | α² c Uv] of each head; see ``widen_queries``."""
    return _beside(heads, [alpha**2 * _product(context, adapter.v) for adapter, alpha in active])


def project(attended: Tensor, out: Callable[[Tensor], Tensor], active: Active) -> Tensor:
    """What the heads (B, H, L, d + Σr) become by [Wo; So]: (B, L, output width)."""
    width = attended.shape[-1] - sum(adapter.rank for adapter, _ in active)
    parts = attended.split([width, *(adapter.rank for adapter, _ in active)], -1)
    frozen, *added = (part.transpose(1, 2).flatten(2) for part in parts)
    found = out(frozen)
    for (adapter, _), part in zip(active, added, strict=True):
        assert adapter.o is not None  # ``out`` is there
        found = found + _product(part, adapter.o)
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None,
           dropout: float = 0.0) -> Tensor:
    """softmax(s q kᵀ + mask) v, each (B, H, L, width)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout)


@torch.no_grad()
def merged(frozen: Projections, heads: int, scale: float, active: Active) -> Projections:
    """Dense projections of an attention with heads d + Σr wide that computes the same.

    Compressed projections become dense ones, too.

    Args:
        frozen: the projections; without biases of queries and keys these columns are exact, with
            biases the new columns have none.
        heads: the number of heads.
        scale: of the frozen attention; the new one divides by √(d + Σr) instead.
        active: the adapters, which have queries and keys.
    """
    width = frozen.q.out_features // heads + sum(adapter.rank for adapter, _ in active)
    rows = {"q": (frozen.q, scale * math.sqrt(width), 1), "k": (frozen.k, 1.0, 1),
            "v": (frozen.v, 1.0, 2)}
    wide = {name: merged_rows(linear, heads, factor,
                               [alpha**power * getattr(adapter, name) for adapter, alpha in active])
            for name, (linear, factor, power) in rows.items()}
    return Projections(**wide, out=None if frozen.out is None else
                       merged_columns(frozen.out, heads, [adapter.o for adapter, _ in active
                                                    if adapter.o is not None]))


def merged_rows(linear: Linear, heads: int, factor: float,
                 added: Sequence[Tensor]) -> nn.Linear:
    """factor · [W; A] with the rows of each head together."""
    parts = [part.unflatten(0, (heads, -1)) for part in (linear.weight, *added)]
    weight = factor * torch.cat([part.to(linear.weight) for part in parts], 1).flatten(0, 1)
    bias = linear.bias
    if bias is not None:
        more = weight.shape[0] // heads - bias.shape[0] // heads
        bias = factor * F.pad(bias.unflatten(0, (heads, -1)), (0, more)).flatten()
    return _linear(weight, bias)


def merged_columns(linear: Linear, heads: int, added: Sequence[Tensor]) -> nn.Linear:
    """[W | S] with the columns of each head together."""
    parts = [part.unflatten(1, (heads, -1)).to(linear.weight) for part in (linear.weight, *added)]
    return _linear(torch.cat(parts, 2).flatten(1), linear.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    found = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    found.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        found.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return found
