"""What attentions, MLPs, blocks and encoders look like, whichever library they come from.

``adacomcat/families`` fills the tables here, one file for each library; everything else asks the
functions at the end and names no library's class. The exact type of a module decides, since a
subclass may compute something else.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.layers.plain import altered, altered_inside, is_plain, is_plain_linear
from adacomcat.layers.quantized import QuantizedLinear
from adacomcat.utils.inputs import Inputs
from adacomcat.utils.model import input_size

# A: queries with keys and values with outputs fold head by head. B: only values with outputs do.
Tier = Literal["A", "B"]


class Projection(NamedTuple):
    """y = x weightᵀ + bias: a dense projection, or a part of a fused one."""

    weight: Tensor  # (out, in)
    bias: Tensor | None = None  # (out,)
    plain: bool = True  # whether these numbers are all that decides: see ``layers/plain.py``
    origin: nn.Module | None = None  # the layer that they were read from
    scale: Tensor | None = None  # (out,), of an int8 layer; ``weight`` is then q · scale

    @classmethod
    def of(cls, linear: nn.Linear | QuantizedLinear) -> "Projection":
        """The whole of ``linear``.

        Raises:
            UserError: It has no weight that can be read, such as a quantised layer.
        """
        if not isinstance(getattr(linear, "weight", None), Tensor):
            raise UserError(f"{type(linear).__name__} has no weight that can be read; only linear "
                            "layers are projections")
        bias = None if linear.bias is None else linear.bias.detach()
        if isinstance(linear, QuantizedLinear):
            scale = linear.weight_scale if linear.bits == 8 else None
            return cls(linear.dense, bias, False, linear, scale)
        return cls(linear.weight.detach(), bias, is_plain_linear(linear), linear)

    def split(self, parts: int) -> "list[Projection]":
        """The rows of several projections that one layer computes, those of each one together."""
        biases = [None] * parts if self.bias is None else self.bias.chunk(parts)
        scales = [None] * parts if self.scale is None else self.scale.chunk(parts)
        return [self._replace(weight=weight, bias=bias, scale=scale) for weight, bias, scale
                in zip(self.weight.chunk(parts), biases, scales, strict=True)]


class AttentionWeights(NamedTuple):
    """The projections of a dense attention, head by head; absent biases are zeros."""

    wq: Tensor  # (H, head_dim, d)
    wk: Tensor
    wv: Tensor
    bq: Tensor  # (H, head_dim)
    bk: Tensor
    bv: Tensor
    wo: Tensor  # (H, out, head_dim)
    bo: Tensor  # (out,)
    scale: float


@dataclass(frozen=True)
class AttentionParts:
    """A dense attention: y = Σ_h softmax(scale · q_h k_hᵀ + mask) v_h out_hᵀ.

    Args:
        q: Query projection, weight (H·head_dim, d): the rows of one head after those of another.
        k: Key projection, of the same shape.
        v: Value projection, of the same shape.
        out: Output projection, weight (out, H·head_dim).
        num_heads: H.
        scale: What multiplies the logits, usually head_dim ** -0.5.
        attn_drop: Dropout probability of the attention weights.
        proj_drop: Dropout probability behind the output projection.

    Raises:
        UserError: The shapes of the projections do not belong together.
    """

    q: Projection
    k: Projection
    v: Projection
    out: Projection
    num_heads: int
    scale: float
    attn_drop: float = 0.0
    proj_drop: float = 0.0

    def __post_init__(self) -> None:
        shapes = [tuple(p.weight.shape) for p in (self.q, self.k, self.v, self.out)]
        inner = shapes[0][0]
        if len(set(shapes[:3])) > 1 or shapes[3][1] != inner or inner % self.num_heads:
            raise UserError("q, k, v and out have the weights "
                            f"{', '.join(map(str, shapes))} for {self.num_heads} heads; q, k and v "
                            "must be (heads·head_dim, d), out (any, heads·head_dim)")

    @property
    def dim(self) -> int:
        return self.q.weight.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q.weight.shape[0] // self.num_heads

    @property
    def dim_out(self) -> int:
        return self.out.weight.shape[0]

    @property
    def plain(self) -> bool:
        return all(p.plain for p in (self.q, self.k, self.v, self.out))

    def per_head(self) -> AttentionWeights:
        heads = self.num_heads
        inner = (self.q, self.k, self.v)
        wq, wk, wv = (p.weight.reshape(heads, -1, self.dim) for p in inner)
        zeros = wq.new_zeros(wq.shape[:2])
        bq, bk, bv = (zeros if p.bias is None else p.bias.reshape(heads, -1) for p in inner)
        wo, bo = self.out.weight, self.out.bias
        bo = wo.new_zeros(len(wo)) if bo is None else bo
        wo = wo.reshape(len(wo), heads, -1).transpose(0, 1)
        return AttentionWeights(wq, wk, wv, bq, bk, bv, wo, bo, self.scale)


# (attention, the model that holds it or None) → tier; None where not even the values fold. It
# looks at the attention's structure; ``attention_tier`` asks whether its parts are plain.
TierOf = Callable[[nn.Module, nn.Module | None], Tier | None]


@dataclass(frozen=True)
class AttentionFamily:
    """How one class of attention is read, and which drop-in takes its place."""

    read: Callable[[Any], AttentionParts]
    low_rank: Mapping[str, type[Any]]  # tier → subclass of LowRankAttention
    tier: TierOf
    # Whether all that ``read`` takes for granted is so: exact types, which nobody changed.
    plain: Callable[[Any], bool] | None = None

    def reads(self, attn: nn.Module) -> bool:
        """Whether ``read`` tells all that ``attn`` computes."""
        if altered_inside(attn) or not (self.plain is None or self.plain(attn)):
            return False
        return self.read(attn).plain


@dataclass(frozen=True)
class MlpParts:
    """y = fc2(act(fc1(x))), with dropout behind ``act`` and ``fc2``."""

    fc1: nn.Module
    act: nn.Module
    fc2: nn.Module
    drop: float  # the probability behind ``act``
    plain: bool  # whether nothing else stands between; a norm behind ``act`` does
    names: tuple[str, str] = ("fc1", "fc2")  # of the projections in the module

    @property
    def dense(self) -> bool:
        """Plain, and so are both projections, which are linear layers."""
        return self.plain and is_plain_linear(self.fc1) and is_plain_linear(self.fc2)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """fc1 and fc2, of an MLP that is known to be dense."""
        return cast(nn.Linear, self.fc1), cast(nn.Linear, self.fc2)


def called(inner: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """``inner(x)``"""
    return inner(x, **kwargs)


@dataclass(frozen=True)
class Residual:
    """One half of a block in eval mode: x + scale(inner(norm(x)))."""

    name: str  # of ``inner`` in its block
    norm: nn.Module
    inner: Any  # a module of whatever class
    scale: nn.Module
    gamma: Tensor | None  # (d,): what ``scale`` multiplies by; None where it is the identity
    run: Callable[..., Tensor] = called  # how ``inner`` is called, for classes with other arguments
    # What makes one op of this half: for a drop-in with more than masks behind its logits, and for
    # a gated MLP.
    fuse: Callable[["Residual"], nn.Module] | None = None


class BlockParts(NamedTuple):
    """A pre-norm block: the attention, then the MLP."""

    attn: Residual
    mlp: Residual
    # Makes of both fused halves what takes the block's place; None for the signature of timm.
    build: Callable[[nn.Module, nn.Module], nn.Module] | None = None


@dataclass(frozen=True)
class EncoderParts:
    """A model that is known as a whole: tokens, blocks one after the other, a head."""

    name: str  # of ``blocks`` in the model
    blocks: nn.Sequential | nn.ModuleList
    tokens: Callable[[Any], Tensor]  # images → what enters the first block, (B, N, d)
    # Makes the model that computes only the class token in its last block; None where the head
    # reads more than that token.
    class_token_only: Callable[[], nn.Module] | None
    step: Callable[..., Tensor] = called  # how a block is called with tokens


# Package of a class → the file that knows its classes. Each one is imported, and taken out here,
# when the first class of its package is looked up.
_FAMILIES = {library: f"adacomcat.families.{library}"
             for library in ("torch", "timm", "torchvision", "transformers", "open_clip")}

# The holder of modules that were replaced, and the ranks of what is inside, by its own names.
Changed = Callable[[Any, Mapping[str, Any]], None]

_attentions: dict[type[nn.Module], AttentionFamily] = {}
_mlps: dict[type[nn.Module], Callable[[Any], MlpParts | None]] = {}
_blocks: dict[type[nn.Module], Callable[[Any], BlockParts | None]] = {}
_encoders: dict[type[nn.Module], Callable[[Any], EncoderParts | None]] = {}
_patch_projections: dict[type[nn.Module], str] = {}
_position_networks: set[str] = set()
_holders: dict[type[nn.Module], Changed] = {}
_examples: dict[type[nn.Module], Callable[[Any], Inputs]] = {}


def load_family(kind: type) -> None:
    """Import the file for the library of ``kind``, once. Registrations by users come later."""
    library = kind.__module__.partition(".")[0]
    file = _FAMILIES.pop(library, None)
    if file is None:
        return
    try:
        importlib.import_module(file)
    except ImportError as error:
        warnings.warn(f"adacomcat does not know the classes of this version of {library} "
                      f"({error}): its linear layers become low-rank one by one, and its "
                      "attentions do not fold", stacklevel=2)


def add_attention(kind: type[nn.Module], family: AttentionFamily) -> None:
    _attentions[kind] = family


def add_mlp(kind: type[nn.Module], read: Callable[[Any], MlpParts | None]) -> None:
    """``read`` gives None for a module that is no MLP."""
    _mlps[kind] = read


def add_block(kind: type[nn.Module], read: Callable[[Any], BlockParts | None]) -> None:
    """``read`` gives None for a block that has other parts than its class."""
    _blocks[kind] = read


def add_encoder(kind: type[nn.Module], read: Callable[[Any], EncoderParts | None]) -> None:
    _encoders[kind] = read


def add_patch_projection(kind: type[nn.Module], name: str) -> None:
    """``name``: of the convolution in a patch embedding of this kind."""
    _patch_projections[kind] = name


def add_position_network(name: str) -> None:
    """``name``: of a child module whose linear layers see coordinates, not tokens."""
    _position_networks.add(name)


def add_holder(kind: type[nn.Module], changed: Changed) -> None:
    """``changed`` is called with a module of this class, or of one that derives from it, and with
    the ranks of the plan inside of it, after modules were replaced."""
    _holders[kind] = changed


def tell_holders(model: nn.Module, ranks: Mapping[str, Any]) -> None:
    """Tell ``model``, and modules inside that hold others, that modules were replaced."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for kind in type(module).__mro__[:-1]:
            load_family(kind)
            if kind in _holders:
                _holders[kind](module, {site.removeprefix(prefix): rank
                                        for site, rank in ranks.items()
                                        if site.startswith(prefix)})


def add_example(kind: type[nn.Module], make: Callable[[Any], Inputs]) -> None:
    """``make``: of a model of this class, or of one that derives from it, an input of zeros."""
    _examples[kind] = make


def example(model: nn.Module) -> Inputs:
    """What one image is to ``model``: zeros where its parameters lie."""
    parameter = next(model.parameters())
    for kind in type(model).__mro__[:-1]:
        load_family(kind)
        if kind in _examples:
            return _examples[kind](model).to(parameter.device, parameter.dtype)
    return torch.zeros(1, *input_size(model), device=parameter.device, dtype=parameter.dtype)


def attention_family(attn: nn.Module) -> AttentionFamily | None:
    load_family(type(attn))
    return _attentions.get(type(attn))


def attention_tier(attn: nn.Module, model: nn.Module | None = None) -> Tier | None:
    """How far ``attn`` of ``model`` folds; None where not even its value path does."""
    family = attention_family(attn)
    tier = None if family is None else family.tier(attn, model)
    return tier if family is not None and tier is not None and family.reads(attn) else None


def attention_is_altered(attn: nn.Module, model: nn.Module | None = None) -> bool:
    """Whether ``attn`` would fold, were it not for what someone changed about it."""
    family = attention_family(attn)
    return (family is not None and family.tier(attn, model) is not None
            and not family.reads(attn))


def attention_parts(attn: nn.Module) -> AttentionParts:
    """
    Raises:
        UserError: No family knows this class.
    """
    family = attention_family(attn)
    if family is None:
        raise UserError(f"{type(attn).__name__} does not fold; its linears can still be made "
                        "low-rank, or adacomcat.register_attention can make it known")
    return family.read(attn)


def attention_weights(attn: nn.Module) -> AttentionWeights:
    """The weights of a dense attention, head by head."""
    return attention_parts(attn).per_head()


def mlp_parts(module: nn.Module) -> MlpParts | None:
    load_family(type(module))
    read = _mlps.get(type(module))
    return None if read is None else read(module)


def mlp_is_altered(module: nn.Module) -> bool:
    """Whether ``module`` is of a known class of MLPs and someone changed it, as a whole."""
    return altered(module) and mlp_parts(module) is not None


def block_parts(module: nn.Module) -> BlockParts | None:
    """The halves of a known block; None where it is unknown or altered."""
    load_family(type(module))
    read = _blocks.get(type(module))
    return None if read is None or altered(module) else read(module)


def encoder_parts(model: nn.Module) -> EncoderParts | None:
    """The parts of a known model; None where it is unknown or altered."""
    load_family(type(model))
    read = _encoders.get(type(model))
    parts = None if read is None or altered(model) else read(model)
    plain = parts is not None and is_plain(parts.blocks, nn.Sequential, nn.ModuleList)
    return parts if plain else None


def patch_projection(module: nn.Module) -> str | None:
    """The name of the convolution in a patch embedding; None where ``module`` is none."""
    load_family(type(module))
    return None if altered(module) else _patch_projections.get(type(module))


def is_position_network(name: str) -> bool:
    """Whether the module of this qualified name maps coordinates to position biases."""
    return name.rpartition(".")[2] in _position_networks
