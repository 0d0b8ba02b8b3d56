"""Whole sublayers on the fused kernels: for inference, after everything else is decided.

x + ls · f(norm(x)) becomes one op: the weight and bias of the layer norm and the layer scale are
folded into the projections, exactly, and the op adds the residual last. ``fuse.optimize`` and the
latency tables make these modules.
"""

from typing import cast

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.fx import Proxy

from adacomcat.errors import UserError
from adacomcat.factorize.gauge import MlpFactors, identity_gauge
from adacomcat.layers.attention import ValueFoldedAttention
from adacomcat.layers.folding import (
    AffineMap,
    attention_scales,
    behind_one_factor,
    bias_of,
    factors_of,
    first_float,
    gamma_of,
    is_affine,
    join_,
    norm_of,
    projections_of,
    rotary_projections_of,
    set_weights_,
    times,
)
from adacomcat.layers.mlp import activation_name
from adacomcat.layers.packed import PackedModule
from adacomcat.layers.plain import is_plain, is_plain_linear
from adacomcat.layers.registry import (
    MlpParts,
    Projection,
    Residual,
    attention_parts,
    attention_tier,
)
from adacomcat.layers.stock import causal_mask
from adacomcat.ops import inference


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
        attn, like = part.inner, first_float(part.inner)
        affine = norm_of(part.norm, like)
        p, self.num_heads, self.scale = projections_of(attn)
        scales = attention_scales(attn)
        gamma = gamma_of(part, p.wo)
        self.epsilon = affine.epsilon
        # The norm's bias cancels in the softmax where every key has it, and passes through the
        # softmax into bo where every value has it.
        bo = p.bo + p.wo @ (p.wv @ affine.bias)
        set_weights_(self, like, wq=p.wq * affine.weight, wk=p.wk * affine.weight,
                     wv=p.wv * affine.weight, bq=p.bq + p.wq @ affine.bias,
                     wo=gamma.unsqueeze(1) * p.wo, bo=gamma * bo)
        if scales:
            self.quantize_(**scales | {"wo": times(scales["wo"], gamma)})
        elif like.is_cuda:
            join_(self.wq, self.wk, self.wv)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        return self.fused(x, self.num_heads, self.scale, causal_mask(attn_mask, x, is_causal))

    def class_token(self, x: Tensor) -> Tensor:
        """The class token of the result, (B, 1, d): the first one."""
        return inference.class_attention(
            x, self.wq, self.bq, self.wk, self.wv, self.wo, self.bo, self.num_heads, self.scale,
            self.epsilon)


class FusedRotaryAttention(PackedModule):
    """x + ls · attention(norm(x)) where queries and keys turn by the position of their token.

    For a ``ValueFoldedAttention`` or a dense attention without norms behind its projections.

    Args:
        part: The attention's half of a block; its norm satisfies ``is_layer_norm``.
        half: Which elements turn together, as in ``inference.rotary_attention``.
    """

    op = "rotary_attention"
    operands = ("vq", "wq", "bq", "vk", "wk", "bk", "wv", "wo", "bo")
    weights = {"vq": False, "wq": True, "vk": False, "wk": True, "wv": True, "wo": True}

    def __init__(self, part: Residual, half: bool) -> None:
        super().__init__()
        attn, like = part.inner, first_float(part.inner)
        affine = norm_of(part.norm, like)
        p, self.num_heads, self.scale = rotary_projections_of(attn)
        self.turns_halves, self.epsilon = half, affine.epsilon
        gamma = gamma_of(part, p.wo)
        for letter, projection in (("q", p.q), ("k", p.k)):
            folded = projection.behind(affine)
            set_weights_(self, like, **{f"v{letter}": folded.v, f"w{letter}": folded.w,
                                        f"b{letter}": folded.bias})
        bo = p.bo + p.wo @ (p.wv @ affine.bias)
        set_weights_(self, like, wv=p.wv * affine.weight, wo=gamma.unsqueeze(1) * p.wo,
                     bo=gamma * bo)

    def attend(self, x: Tensor, sin: Tensor | None, cos: Tensor | None,
               mask: Tensor | None) -> Tensor:
        """x + ls · attention(norm(x)); sin and cos as in ``inference.rotary_attention``."""
        return self.fused(x, self.num_heads, self.scale, sin, cos, self.turns_halves,
                          mask)


def gains_from_op(weight: Tensor) -> bool:
    """Whether an op is faster than PyTorch for a dense attention with this weight.

    Elsewhere than on a CPU it gains more from one library product for q, k and v.
    """
    return weight.is_cpu


def fuses_dense(attn: nn.Module) -> bool:
    """Whether an op computes this dense attention, and faster than PyTorch does."""
    return is_plain_attention(attn) and gains_from_op(attention_parts(attn).q.weight)


def is_plain_attention(attn: nn.Module) -> bool:
    """Whether this dense attention folds, and its projections compute nothing else."""
    return attention_tier(attn) is not None and attention_parts(attn).plain


def fuses_rotary(attn: nn.Module) -> bool:
    """The same where queries and keys may turn; nothing else stands behind their projections.

    Elsewhere than on a CPU a dense one gains where a kernel turns behind the projections.
    """
    if isinstance(attn, ValueFoldedAttention):
        return is_affine(attn.q) and is_affine(attn.k)
    if not is_plain_attention(attn):
        return False
    weight = attention_parts(attn).q.weight
    return weight.is_cpu or inference.runs_kernel(FusedRotaryAttention.op, weight)


class FusedMlp(PackedModule):
    """x + ls · mlp(norm(x)), for two low-rank layers or two pairs of layers, whose parts are
    ``mlp``."""

    op = "low_rank_mlp"
    operands = ("v1", "u1", "b1", "v2", "u2", "b2")
    weights = {"v1": False, "u1": True, "v2": False, "u2": True}

    def __init__(self, part: Residual, mlp: MlpParts) -> None:
        super().__init__()
        like = first_float(part.inner)
        affine = norm_of(part.norm, like)
        fc1, fc2 = factors_of(mlp.fc1), factors_of(mlp.fc2)
        gamma = gamma_of(part, fc2.u)
        self.activation, self.epsilon = activation_name(mlp.act), affine.epsilon
        factors = MlpFactors(affine.weight.unsqueeze(1) * fc1.v, fc1.u,
                             fc1.bias + fc1.u @ (affine.bias @ fc1.v),
                             fc2.v, gamma.unsqueeze(1) * fc2.u)
        # The identities save products; in bfloat16 and float16 they would cost one more rounding.
        if like.is_cpu and like.dtype == torch.float32 and not fc1.scales:
            factors = identity_gauge(factors)
        set_weights_(self, like, **factors._asdict(), b2=gamma * fc2.bias)
        if fc1.scales:
            self.quantize_(v1=fc1.scales["v"], u1=fc1.scales["u"], v2=fc2.scales["v"],
                           u2=times(fc2.scales["u"], gamma))

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x, self.activation)


class FusedGatedMlp(PackedModule):
    """x + ls · down(act(gate(norm(x))) · up(norm(x))), each of the three dense or low-rank.

    Args:
        part: The MLP's half of a block; its norm satisfies ``is_layer_norm``.
        gate: The map whose activation multiplies.
        up: The map that is multiplied.
        down: The map behind both.
        act: The activation, which the ops know.
    """

    op = "gated_mlp"
    operands = ("v1", "wg", "bg", "w1", "b1", "v2", "w2", "b2")
    weights = {"v1": False, "wg": True, "w1": True, "v2": False, "w2": True}

    def __init__(self, part: Residual, gate: AffineMap, up: AffineMap, down: AffineMap,
                 act: nn.Module) -> None:
        super().__init__()
        like = first_float(part.inner)
        affine = norm_of(part.norm, like)
        gate, up = (one.behind(affine) for one in behind_one_factor(gate, up))
        down = down.scaled(gamma_of(part, down.w))
        self.activation, self.epsilon = activation_name(act), affine.epsilon
        set_weights_(self, like, v1=gate.v, wg=gate.w, bg=gate.bias, w1=up.w, b1=up.bias,
                     v2=down.v, w2=down.w, b2=down.bias)

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
        like = first_float(part.inner)
        affine = norm_of(part.norm, like)
        gamma = gamma_of(part, fc2.weight)
        w1, w2 = fc1.weight.double(), fc2.weight.double()
        self.activation, self.epsilon = activation_name(mlp.act), affine.epsilon
        set_weights_(self, like, w1=w1 * affine.weight, b1=bias_of(fc1) + w1 @ affine.bias,
                     w2=gamma.unsqueeze(1) * w2, b2=gamma * bias_of(fc2))
        if fc1.scale is not None and fc2.scale is not None:
            self.quantize_(w1=fc1.scale, w2=times(fc2.scale, gamma))

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
        """The class token of the result, (B, 1, d); ``attn`` is a ``FusedAttention``.

        Raises:
            UserError: ``fully_shard`` has cut the weights, and gathers them for ``forward`` alone.
        """
        if hasattr(self.attn.wq, "device_mesh"):
            raise UserError("an optimized model holds packed weights, which fully_shard does not "
                            "cut; shard the model that adacomcat.optimize was given")
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
        tokens = inference.patch_embedding(input, self.weight, self.bias)
        return tokens.transpose(1, 2).unflatten(2, (rows, -1))


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
