"""Whole sublayers on the fused kernels: for inference, after everything else is decided.

x + ls · f(norm(x)) becomes one op: the weight and bias of the layer norm and the layer scale are
folded into the projections, exactly, and the op adds the residual last. ``fuse.optimize`` and the
latency tables make these modules.
"""

from typing import NamedTuple, cast

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.fx import Proxy

from adacomcat.errors import UserError
from adacomcat.factorize.gauge import MlpFactors, identity_gauge
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import activation_name
from adacomcat.layers.packed import PackedModule
from adacomcat.layers.plain import is_plain, is_plain_linear
from adacomcat.layers.registry import (
    MlpParts,
    Projection,
    Residual,
    attention_parts,
    attention_weights,
)
from adacomcat.layers.stock import PlainAttention, causal_mask
from adacomcat.ops import inference


class Norm(NamedTuple):
    """A layer norm's affine part in float64, and its epsilon."""

    weight: Tensor
    bias: Tensor
    epsilon: float


class Projections(NamedTuple):
    """An attention's, in float64: wq, wk (H·rank_qk, d), wv (H·rank_vo, d), wo (out, H·rank_vo)."""

    wq: Tensor
    bq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor
    bo: Tensor


Scales = dict[str, Tensor]  # weight of a quantised sublayer → (out,); empty in others


class FusedAttention(PackedModule):
    """x + ls · attention(norm(x)), for a ``LowRankAttention`` or a dense attention of tier A.

    Both may be quantised; then the norm is trivial.

    Args:
        part: The attention's half of a block; its norm satisfies ``is_layer_norm``.
    """

    op = "low_rank_attention"
    operands = ("wq", "bq", "wk", "wv", "wo", "bo")
    weights = {"wq": True, "wk": True, "wv": True, "wo": True}

    wq: nn.Parameter
    bq: nn.Parameter
    wk: nn.Parameter
    wv: nn.Parameter
    wo: nn.Parameter
    bo: nn.Parameter

    def __init__(self, part: Residual) -> None:
        super().__init__()
        attn, like = part.inner, _first_float(part.inner)
        affine = _affine(part.norm, like)
        p, self.num_heads, self.scale = _projections(attn)
        scales = _attention_scales(attn)
        gamma = _gamma(part, p.wo)
        self.epsilon = affine.epsilon
        # The norm's bias cancels in the softmax where every key has it, and passes through the
        # softmax into bo where every value has it.
        bo = p.bo + p.wo @ (p.wv @ affine.bias)
        _set_weights(self, like, wq=p.wq * affine.weight, wk=p.wk * affine.weight,
                     wv=p.wv * affine.weight, bq=p.bq + p.wq @ affine.bias,
                     wo=gamma.unsqueeze(1) * p.wo, bo=gamma * bo)
        if scales:
            self.quantize_(**scales | {"wo": _times(scales["wo"], gamma)})
        elif like.is_cuda:
            _join_(self.wq, self.wk, self.wv)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        return self.fused(x, self.num_heads, self.scale, causal_mask(attn_mask, x, is_causal))

    def class_token(self, x: Tensor) -> Tensor:
        """The class token of the result, (B, 1, d): the first one."""
        return inference.class_attention(
            x, self.wq, self.bq, self.wk, self.wv, self.wo, self.bo, self.num_heads, self.scale,
            self.epsilon)


class FusedMlp(PackedModule):
    """x + ls · mlp(norm(x)), for two low-rank layers or two pairs of layers, whose parts are
    ``mlp``."""

    op = "low_rank_mlp"
    operands = ("v1", "u1", "b1", "v2", "u2", "b2")
    weights = {"v1": False, "u1": True, "v2": False, "u2": True}

    def __init__(self, part: Residual, mlp: MlpParts) -> None:
        super().__init__()
        like = _first_float(part.inner)
        affine = _affine(part.norm, like)
        fc1, fc2 = _factors(mlp.fc1), _factors(mlp.fc2)
        gamma = _gamma(part, fc2.u)
        self.activation, self.epsilon = activation_name(mlp.act), affine.epsilon
        factors = MlpFactors(affine.weight.unsqueeze(1) * fc1.v, fc1.u,
                             fc1.bias + fc1.u @ (affine.bias @ fc1.v),
                             fc2.v, gamma.unsqueeze(1) * fc2.u)
        # The identities save products; in bfloat16 and float16 they would cost one more rounding.
        if like.is_cpu and like.dtype == torch.float32 and not fc1.scales:
            factors = identity_gauge(factors)
        _set_weights(self, like, **factors._asdict(), b2=gamma * fc2.bias)
        if fc1.scales:
            self.quantize_(v1=fc1.scales["v"], u1=fc1.scales["u"], v2=fc2.scales["v"],
                           u2=_times(fc2.scales["u"], gamma))

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x, self.activation)


class FusedDenseMlp(PackedModule):
    """x + ls · mlp(norm(x)), for a dense MLP of two linear layers, whose parts are ``mlp``."""

    op = "dense_mlp"
    operands = ("w1", "b1", "w2", "b2")
    weights = {"w1": True, "w2": True}

    def __init__(self, part: Residual, mlp: MlpParts) -> None:
        super().__init__()
        fc1, fc2 = (Projection.of(cast(nn.Linear, linear)) for linear in (mlp.fc1, mlp.fc2))
        like = _first_float(part.inner)
        affine = _affine(part.norm, like)
        gamma = _gamma(part, fc2.weight)
        w1, w2 = fc1.weight.double(), fc2.weight.double()
        self.activation, self.epsilon = activation_name(mlp.act), affine.epsilon
        _set_weights(self, like, w1=w1 * affine.weight, b1=_bias(fc1) + w1 @ affine.bias,
                     w2=gamma.unsqueeze(1) * w2, b2=gamma * _bias(fc2))
        if fc1.scale is not None and fc2.scale is not None:
            self.quantize_(w1=fc1.scale, w2=_times(fc2.scale, gamma))

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x, self.activation)


class Sublayer(nn.Module):
    """x + ls · f(norm(x)) where f stays what it is."""

    def __init__(self, part: Residual) -> None:
        super().__init__()
        self.norm, self.inner, self.scale, self.run = part.norm, part.inner, part.scale, part.run

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        return x + self.scale(self.run(self.inner, self.norm(x), **kwargs))


class FusedBlock(nn.Module):
    """A pre-norm block in eval mode, with the signature of timm's ``Block``.

    Args:
        attn: x + ls · attention(norm(x)), a ``FusedAttention`` or a ``Sublayer``.
        mlp: x + ls · mlp(norm(x)), fused or a ``Sublayer``.
    """

    attn: nn.Module
    mlp: nn.Module

    def __init__(self, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        require_tensor(x)
        return self.mlp(self.attn(x, attn_mask=attn_mask, is_causal=is_causal))

    def class_token(self, x: Tensor) -> Tensor:
        """The class token of the result, (B, 1, d); ``attn`` is a ``FusedAttention``."""
        return self.mlp(cast(FusedAttention, self.attn).class_token(x))


class FusedPatches(nn.Conv2d):
    """A convolution whose kernel is as large as its stride; it shares the weights of ``conv``."""

    def __init__(self, conv: nn.Conv2d) -> None:
        size = conv.kernel_size[0], conv.kernel_size[1]
        super().__init__(conv.in_channels, conv.out_channels, size, size,
                         bias=conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        require_tensor(input)
        rows = input.shape[2] // self.kernel_size[0]
        # (B, out, rows, columns), laid out patch after patch: timm's flatten copies nothing.
        return inference.patch_embedding(input, self.weight, self.bias).mT.unflatten(2, (rows, -1))


class GemvLinear(nn.Linear):
    """A linear layer whose input has few rows, such as a head in small batches: a gemv a row.

    It shares the weights of ``linear``.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None,
                         device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return inference.linear(input, self.weight, self.bias)


class ClassTokenEncoder(nn.Module):
    """A model whose last block, a ``FusedBlock``, computes the class token only.

    Subclasses have the signature of a library.
    """

    blocks: nn.Sequential


def require_tensor(x: object) -> None:
    """
    Raises:
        UserError: ``torch.fx`` follows the model.
    """
    if isinstance(x, Proxy):
        raise UserError("torch.fx does not follow the kernels of an optimized model; trace the "
                        "model that adacomcat.optimize was given")


def gemv_linear(head: nn.Module) -> nn.Module:
    """A ``GemvLinear`` for a plain linear layer; anything else as it is."""
    return GemvLinear(cast(nn.Linear, head)) if is_plain_linear(head) else head


_LAYER_NORMS: set[type[nn.Module]] = {nn.LayerNorm, LayerNorm}


def add_layer_norm(kind: type[nn.LayerNorm]) -> None:
    """Say that ``kind`` computes what ``nn.LayerNorm`` does."""
    _LAYER_NORMS.add(kind)


def is_layer_norm(norm: nn.Module) -> bool:
    """Whether the fused ops know this norm: a layer norm over the last dimension."""
    known = is_plain(norm, *_LAYER_NORMS)
    return known and len(cast(nn.LayerNorm, norm).normalized_shape) == 1


def is_trivial(module: nn.Module) -> bool:
    """Whether a layer norm multiplies by nothing and adds nothing: weights keep their grid."""
    norm = cast(nn.LayerNorm, module)
    return ((norm.weight is None or bool((norm.weight == 1).all()))
            and (norm.bias is None or not norm.bias.any()))


def _affine(module: nn.Module, like: Tensor) -> Norm:
    """``like``: on the device of the projections, for a norm that has no weight."""
    norm = cast(nn.LayerNorm, module)
    width = norm.normalized_shape[0]
    weight = like.new_ones(width) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.detach()
    return Norm(weight.double(), bias.double(), norm.eps)


def _projections(attn: nn.Module) -> tuple[Projections, int, float]:
    """The folded projections, the number of heads and the scale of the logits."""
    if isinstance(attn, LowRankAttention):
        weights = (attn.wq, attn.bq, attn.wk, attn.wv, attn.wo, attn.bo)
        return (Projections(*(w.detach().double() for w in weights)), attn.num_heads, attn.scale)
    if isinstance(attn, PlainAttention):
        q, k, v, out = _plain_projections(attn)
        bias = _bias(out) if v.bias is None else _bias(out) + out.weight.double() @ _bias(v)
        return (Projections(q.weight.double(), _bias(q), k.weight.double(), v.weight.double(),
                            out.weight.double(), bias), attn.num_heads, attn.scale)
    w = attention_weights(attn)
    wq, bq, wk, wv, bv = (t.double().flatten(0, 1) for t in (w.wq, w.bq, w.wk, w.wv, w.bv))
    wo = w.wo.double().transpose(0, 1).flatten(1)
    return Projections(wq, bq, wk, wv, wo, w.bo.double() + wo @ bv), len(w.wq), w.scale


def _plain_projections(attn: PlainAttention) -> list[Projection]:
    return [Projection.of(cast(nn.Linear, linear))
            for linear in (attn.q, attn.k, attn.v, attn.proj)]


def _attention_scales(attn: nn.Module) -> Scales:
    if isinstance(attn, LowRankAttention):
        return {}
    if isinstance(attn, PlainAttention):
        projections = _plain_projections(attn)
    else:
        parts = attention_parts(attn)
        projections = [parts.q, parts.k, parts.v, parts.out]
    return {name: projection.scale for name, projection
            in zip(("wq", "wk", "wv", "wo"), projections, strict=True)
            if projection.scale is not None}


class Factors(NamedTuple):
    """Of one projection, in float64."""

    v: Tensor  # (in, r)
    u: Tensor  # (out, r)
    bias: Tensor  # (out,)
    scales: Scales


def _factors(linear: nn.Module) -> Factors:
    if isinstance(linear, LowRankLinear):
        return Factors(linear.v.detach().double(), linear.u.detach().double(),
                       _bias(Projection(linear.u, linear.bias)), {})
    first, second = (Projection.of(cast(nn.Linear, layer)) for layer in linear.children())
    scales = {name: scale for name, scale in (("v", first.scale), ("u", second.scale))
              if scale is not None}
    return Factors(first.weight.double().T, second.weight.double(), _bias(second), scales)


def _times(scale: Tensor, gamma: Tensor) -> Tensor:
    """The scales of rows that a layer scale multiplies; positive where it is zero, too."""
    scaled = scale * gamma.abs()
    return scaled.where(scaled > 0, 1)


def _first_float(module: nn.Module) -> Tensor:
    """Whose device and dtype the fused weights get."""
    return next(tensor for tensor in (*module.parameters(), *module.buffers())
                if tensor.is_floating_point())


def _gamma(part: Residual, like: Tensor) -> Tensor:
    if part.gamma is not None:
        return part.gamma.double()
    return like.new_ones(like.shape[0], dtype=torch.float64)


def _bias(projection: Projection) -> Tensor:
    if projection.bias is None:
        return projection.weight.new_zeros(len(projection.weight), dtype=torch.float64)
    return projection.bias.detach().double()


def _set_weights(module: nn.Module, like: Tensor, **weights: Tensor) -> None:
    for name, weight in weights.items():
        parameter = nn.Parameter(weight.to(like).contiguous(), requires_grad=False)
        module.register_parameter(name, parameter)


def _join_(*weights: nn.Parameter) -> None:
    """Store the weights in one matrix, row after row, so that one product computes them all."""
    parts = torch.cat([w.data for w in weights]).split([len(w) for w in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part
