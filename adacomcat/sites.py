"""Where a rank is chosen: every projection of a timm model that low-rank factors can replace.

Exact type decides what may be done (subclasses may compute something else):

A  fold QK and VO head by head: plain softmax attention, additive biases on the logits allowed
B  fold VO only, q and k become low-rank linears: rotary embeddings, normalised queries and keys,
   cosine attention
C  every other ``nn.Linear``; of an MLP instead the number of its hidden neurons may be chosen
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass

from timm.layers import Attention, AttentionRope, Mlp
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as CosineAttention
from torch import nn

DENSE = "dense"
Rank = int | str

# Ranks are multiples of 8 per head and 16 elsewhere: tensor cores and fused attention need it.
MULTIPLE = 8

FOLDABLE = (Attention, AttentionRope, EvaAttention, BeitAttention, WindowAttention,
            CosineAttention)


@dataclass(frozen=True)
class Site:
    """One rank decision. ``rank`` is per head for kinds 'qk' and 'vo', neurons for 'hidden'."""

    name: str
    module: str
    kind: str  # 'linear', 'q', 'k' (tier B projections), 'qk', 'vo', 'hidden'
    in_features: int
    out_features: int
    num_heads: int = 1
    head_dim: int = 0
    tier: str = "C"
    dense_bias: int = 0  # bias parameters of the dense projection
    bias: int = 0  # bias parameters that stay, whatever the rank
    hidden: int = 0  # neurons of a dense MLP

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

    def _weights(self, rank: Rank) -> int:
        if self.folded:
            rank = self.head_dim if rank == DENSE else rank
            return self.num_heads * rank * (self.in_features + self.out_features)
        if rank == DENSE and self.kind == "hidden":
            rank = self.hidden
        if rank == DENSE:
            return self.in_features * self.out_features
        return rank * (self.in_features + self.out_features)

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


def attention_tier(attn: nn.Module, rotary: bool = False) -> str | None:
    """'A', 'B', or None where not even the value path folds."""
    if type(attn) not in FOLDABLE:
        return None
    between = (getattr(attn, "norm", None), getattr(attn, "gate", None))
    if any(part is not None and not isinstance(part, nn.Identity) for part in between):
        return None  # something stands between the values and the output projection
    if getattr(attn, "num_kv_groups", 1) != 1:
        return None  # grouped queries share keys and values
    norms = (getattr(attn, "q_norm", None), getattr(attn, "k_norm", None))
    normed = any(part is not None and not isinstance(part, nn.Identity) for part in norms)
    return "B" if normed or rotary else "A"


def _rotary(model: nn.Module, attn: nn.Module) -> bool:
    """Rotary models hand the embedding to every attention at call time; ask the model."""
    if type(attn) in (AttentionRope, CosineAttention):
        return True
    return type(attn) is EvaAttention and getattr(model, "rope", None) is not None


def has_bias(attn: nn.Module, part: str) -> bool:
    """Whether the projection ``part`` ('q', 'k' or 'v') of a dense attention has a bias."""
    projection = attn.qkv if attn.qkv is not None else getattr(attn, f"{part}_proj")
    separate = getattr(attn, f"{part}_bias", None)
    return projection.bias is not None or isinstance(separate, nn.Parameter)


def _attention_sites(name: str, attn: nn.Module, tier: str) -> Iterator[Site]:
    heads, width, out = attn.num_heads, attn.proj.in_features, attn.proj.out_features
    dim = (attn.qkv if attn.qkv is not None else attn.q_proj).in_features
    bias = {part: width * has_bias(attn, part) for part in "qkv"}
    shape = dict(num_heads=heads, head_dim=width // heads, tier=tier)
    if tier == "A":
        yield Site(f"{name}.qk", name, "qk", dim, dim, dense_bias=bias["q"] + bias["k"], **shape)
    else:
        for part in "qk":
            yield Site(f"{name}.{part}", name, part, dim, width,
                       dense_bias=bias[part], bias=bias[part], **shape)
    proj_bias = 0 if attn.proj.bias is None else out
    yield Site(f"{name}.vo", name, "vo", dim, out, dense_bias=bias["v"] + proj_bias, bias=out,
               **shape)


def narrowable(module: nn.Module) -> bool:
    """Whether hidden neurons of this module can be left out: timm's plain MLP, dense."""
    return type(module) is Mlp and isinstance(module.norm, nn.Identity) and all(
        type(part) is nn.Linear for part in (module.fc1, module.fc2))


def narrowable_mlps(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if narrowable(module)]


def _hidden_site(name: str, mlp: Mlp) -> Site:
    biases = [0 if part.bias is None else part.out_features for part in (mlp.fc1, mlp.fc2)]
    return Site(f"{name}.hidden", name, "hidden", mlp.fc1.in_features, mlp.fc2.out_features,
                dense_bias=sum(biases), bias=biases[1], hidden=mlp.fc1.out_features)


def find_sites(model: nn.Module, narrowing: Container[str] = ()) -> list[Site]:
    """Every rank decision of ``model``, in the order of its modules.

    narrowing: names of MLPs whose hidden neurons are counted, in place of two ranks
    """
    sites: list[Site] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if name in narrowing and narrowable(module):
            sites.append(_hidden_site(name, module))
            inside = (*inside, name + ".")
            continue
        tier = attention_tier(module, _rotary(model, module))
        if tier is not None:
            sites.extend(_attention_sites(name, module, tier))
            inside = (*inside, name + ".")
        elif name.endswith(".cpb_mlp"):  # swin v2's position bias: coordinates, not tokens
            inside = (*inside, name + ".")
        elif type(module) is nn.Linear:
            bias = 0 if module.bias is None else module.out_features
            sites.append(Site(name, name, "linear", module.in_features, module.out_features,
                              dense_bias=bias, bias=bias))
    return sites
