"""Where a rank is chosen: every projection of a model that low-rank factors can replace.

The tier of a module says what may be done:

A  fold QK and VO head by head: plain softmax attention, additive biases on the logits allowed
B  fold VO only, q and k become low-rank linears: rotary embeddings, normalised queries and keys,
   cosine attention
C  every other ``nn.Linear``; in a prunable MLP the number of hidden neurons may be chosen instead

``adacomcat/families`` knows the tiers of each library's attentions.
"""

import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from adacomcat.errors import UserError
from adacomcat.layers.plain import is_altered_linear, is_plain_linear
from adacomcat.layers.registry import (
    AttentionParts,
    Tier,
    attention_is_altered,
    attention_parts,
    attention_tier,
    is_position_network,
    mlp_is_altered,
    mlp_parts,
)
from adacomcat.layers.stock import LinearPair, PlainAttention

DENSE: Literal["dense"] = "dense"
Rank = int | Literal["dense"]
Kind = Literal["linear", "q", "k", "qk", "vo", "hidden"]

# A glob ('blocks.0.*', 'head'), a compiled regular expression, which is searched for, or a test of
# (module name, module). What a filter says of a module holds for everything inside.
Filter = str | re.Pattern[str] | Callable[[str, nn.Module], bool]
Filters = Filter | Iterable[Filter]

# Ranks are multiples of 8 per head and 16 elsewhere: tensor cores and fused attention need it.
MULTIPLE = 8


@dataclass(frozen=True)
class Site:
    """One rank decision. ``rank`` is per head for kinds 'qk' and 'vo', neurons for 'hidden'.

    Args:
        name: Unique in the model: the module's name, with '.qk', '.vo', '.q', '.k' or '.hidden'
            where the module holds more than one projection.
        module: Name of the module that is replaced.
        kind: 'linear'; 'qk' and 'vo' of an attention, in tier B 'q' and 'k' instead of 'qk';
            'hidden' of an MLP.
        in_features: Width of the tokens that enter.
        out_features: Width of what comes out.
        num_heads: Heads of an attention.
        head_dim: Rows of one head in a dense projection.
        tier: 'A', 'B' or 'C', as above.
        dense_bias: Bias parameters of the dense projection.
        bias: Bias parameters that stay, whatever the rank.
        hidden: Neurons of a dense MLP.
    """

    name: str
    module: str
    kind: Kind
    in_features: int
    out_features: int
    num_heads: int = 1
    head_dim: int = 0
    tier: Literal["A", "B", "C"] = "C"
    dense_bias: int = 0
    bias: int = 0
    hidden: int = 0

    @property
    def folded(self) -> bool:
        return self.kind in ("qk", "vo")

    @property
    def full_rank(self) -> int:
        if self.kind == "hidden":
            return self.hidden
        return self.head_dim if self.folded else min(self.in_features, self.out_features)

    @property
    def dense_params(self) -> int:
        return self.params(DENSE)

    @property
    def break_even(self) -> float:
        """Ranks below this one save parameters."""
        if self.folded or self.kind == "hidden":
            return self.full_rank
        return self.in_features * self.out_features / (self.in_features + self.out_features)

    def matrices(self, rank: Rank) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of every weight at this rank, all heads of a projection together."""
        entering, leaving = self.in_features, self.out_features
        if self.kind == "hidden" or self.folded:
            width = (self.num_heads if self.folded else 1) * (
                self.full_rank if rank == DENSE else rank)
            return (width, entering), (width, leaving) if self.kind == "qk" else (leaving, width)
        return ((leaving, entering),) if rank == DENSE else ((rank, entering), (leaving, rank))

    def _weights(self, rank: Rank) -> int:
        return sum(outputs * inputs for outputs, inputs in self.matrices(rank))

    def params(self, rank: Rank) -> int:
        """Parameters at this rank, biases included."""
        if rank == DENSE:
            return self._weights(rank) + self.dense_bias
        per_rank = 0
        if self.kind == "qk":
            per_rank = self.num_heads  # the query bias
        elif self.kind == "hidden":
            per_rank = (self.dense_bias - self.bias) // self.hidden
        return self._weights(rank) + self.bias + per_rank * rank

    def macs(self, rank: Rank, tokens: int, span: int = 0) -> int:
        """Multiply-accumulates over ``tokens`` rows; ``span`` tokens attend to each other."""
        attended = self.num_heads * self.head_dim * span if self.kind == "q" else 0
        if self.folded:
            attended = self.num_heads * (self.head_dim if rank == DENSE else rank) * span
        return tokens * (self._weights(rank) + attended)

    def candidates(self, multiple: int = MULTIPLE) -> tuple[Rank, ...]:
        """Ranks worth considering, ascending, then 'dense'; nothing above break-even."""
        step = multiple if self.folded else 2 * multiple
        ranks = range(step, self.full_rank + 1, step)
        return (*(rank for rank in ranks if rank < self.break_even), DENSE)


def prunable(module: nn.Module) -> bool:
    """Whether hidden neurons of this module can be left out: a known plain MLP, dense."""
    parts = mlp_parts(module)
    return parts is not None and parts.dense


def prunable_mlps(model: nn.Module) -> list[str]:
    """The names of all MLPs of ``model`` whose hidden neurons can be left out."""
    return [name for name, module in model.named_modules()
            if prunable(module) and not is_position_network(name)]


def altered_layers(model: nn.Module) -> list[str]:
    """Names of the layers that would hold sites, had nobody changed what they compute.

    Adapters, masks, hooks, parametrizations and quantised weights do, see ``layers/plain.py``.
    """
    return [name for name, module in model.named_modules()
            if is_altered_linear(module) or mlp_is_altered(module)
            or attention_is_altered(module, model)]


def find_sites(model: nn.Module, pruning: Container[str] = (), include: Filters | None = None,
               exclude: Filters | None = None) -> list[Site]:
    """Every rank decision of ``model``, in the order of its modules.

    Args:
        model: A dense model, or one that is compressed in part.
        pruning: Names of MLPs whose hidden neurons are counted, in place of two ranks. An MLP one
            of whose projections the filters leave out keeps its two ranks.
        include: Only what one of these filters names. Names are those of sites and of modules.
        exclude: Nothing that one of these filters names.

    Raises:
        UserError: A glob or a regular expression fits nothing in the model.
    """
    sites: list[Site] = []
    wanted = _Wanted(model, include, exclude)
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        found: list[Site] | None = None
        if name in pruning and prunable(module) and wanted.pruned(name):
            sites.append(_hidden_site(name, module))
            found = []
        elif (tier := attention_tier(module, model)) is not None:
            found = list(_attention_sites(name, attention_parts(module), tier))
        elif is_position_network(name) or isinstance(module, LinearPair | PlainAttention):
            found = []
        elif isinstance(module, nn.Linear) and is_plain_linear(module):
            bias = 0 if module.bias is None else module.out_features
            found = [Site(name, name, "linear", module.in_features, module.out_features,
                          dense_bias=bias, bias=bias)]
        if found is not None:
            sites.extend(site for site in found if wanted(site.name))
            inside = (*inside, name + ".")
    wanted.require_patterns_used()
    return sites


def _attention_sites(name: str, attn: AttentionParts, tier: Tier) -> Iterator[Site]:
    width, dim, out = attn.out.weight.shape[1], attn.dim, attn.dim_out
    bias = {part: 0 if projection.bias is None else width
            for part, projection in (("q", attn.q), ("k", attn.k), ("v", attn.v))}
    shape: dict[str, Any] = dict(num_heads=attn.num_heads, head_dim=attn.head_dim, tier=tier)
    if tier == "A":
        yield Site(f"{name}.qk", name, "qk", dim, dim, dense_bias=bias["q"] + bias["k"], **shape)
    else:
        yield Site(f"{name}.q", name, "q", dim, width, dense_bias=bias["q"], bias=bias["q"],
                   **shape)
        yield Site(f"{name}.k", name, "k", dim, width, dense_bias=bias["k"], bias=bias["k"],
                   **shape)
    out_bias = 0 if attn.out.bias is None else out
    yield Site(f"{name}.vo", name, "vo", dim, out, dense_bias=bias["v"] + out_bias, bias=out,
               **shape)


def _hidden_site(name: str, mlp: nn.Module) -> Site:
    parts = mlp_parts(mlp)
    assert parts is not None, "prunable admits known MLPs only"
    fc1, fc2 = parts.linears
    biases = [0 if part.bias is None else part.out_features for part in (fc1, fc2)]
    return Site(f"{name}.hidden", name, "hidden", fc1.in_features, fc2.out_features,
                dense_bias=sum(biases), bias=biases[1], hidden=fc1.out_features)


class _Wanted:
    """Whether ``include`` and ``exclude`` want a site; which of their patterns fitted anything."""

    def __init__(self, model: nn.Module, include: Filters | None, exclude: Filters | None) -> None:
        self.modules = dict(model.named_modules())
        self.include, self.exclude = _filters(include), _filters(exclude)
        self.everything = include is None
        self.used: set[Filter] = set()

    def __call__(self, name: str) -> bool:
        included, excluded = self._fits(self.include, name), self._fits(self.exclude, name)
        return (self.everything or included) and not excluded

    def pruned(self, name: str) -> bool:
        """Whether the neurons of the MLP ``name`` may be counted."""
        parts = mlp_parts(self.modules[name])
        inside = () if parts is None else parts.names
        hidden, *projections = (f"{name}.{part}" for part in ("hidden", *inside))
        included = self._fits(self.include, hidden) or all(
            self._fits(self.include, part) for part in projections)
        excluded = any(self._fits(self.exclude, part) for part in (hidden, *projections))
        return (self.everything or included) and not excluded

    def _fits(self, filters: tuple[Filter, ...], name: str) -> bool:
        """Whether one of ``filters`` names this site, or a module that it is inside of."""
        parts = name.split(".")
        chain = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
        fitting = [one for one in filters if any(self._fits_one(one, part) for part in chain)]
        self.used.update(fitting)
        return bool(fitting)

    def _fits_one(self, one: Filter, name: str) -> bool:
        if isinstance(one, str):
            return fnmatchcase(name, one)
        if isinstance(one, re.Pattern):
            return one.search(name) is not None
        return name in self.modules and bool(one(name, self.modules[name]))

    def require_patterns_used(self) -> None:
        for one in (*self.include, *self.exclude):
            if isinstance(one, str | re.Pattern) and one not in self.used:
                text = one if isinstance(one, str) else one.pattern
                raise UserError(f"no projection of this model is called {text!r}; its sites are "
                                "what find_sites(model) lists, and a glob such as 'blocks.0.*' "
                                "names all that is inside")


def _filters(filters: Filters | None) -> tuple[Filter, ...]:
    if filters is None:
        return ()
    if isinstance(filters, str | re.Pattern) or callable(filters):
        return (filters,)
    return tuple(filters)
