"""Whole sublayers on the fused kernels: for inference, after everything else is decided.

x + ls · f(norm(x)) becomes one op: the weight and bias of the layer norm and the layer scale are
folded into the projections, exactly, and the residual is added as the last of it.
"""

from typing import NamedTuple

import torch
from timm.layers import Attention, LayerNorm, LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adacomcat import ops
from adacomcat.factorize.gauge import MlpFactors, identity_gauge
from adacomcat.layers.attention import LowRankAttention, attention_weights, causal_mask
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import LowRankMlp, activation_name
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


class FusedAttention(nn.Module):
    """x + ls · attention(norm(x)), attention a ``LowRankAttention`` or timm's, of full rank.

    A bias that the norm gives to every key cancels in the softmax; given to every value it passes
    through, into bo.
    """

    def __init__(self, norm: nn.LayerNorm, attn: LowRankAttention | Attention,
                 scale: nn.Module) -> None:
        super().__init__()
        affine, p = _affine(norm), _projections(attn)
        gamma, like = _layer_scale(scale, p.wo), next(attn.parameters())
        self.num_heads, self.scale, self.epsilon = attn.num_heads, attn.scale, affine.epsilon
        bo = p.bo + p.wo @ (p.wv @ affine.bias)
        _set_weights(self, like, wq=p.wq * affine.weight, wk=p.wk * affine.weight,
                     wv=p.wv * affine.weight, bq=p.bq + p.wq @ affine.bias,
                     wo=gamma.unsqueeze(1) * p.wo, bo=gamma * bo)
        if like.is_cuda:
            _join_(self.wq, self.wk, self.wv)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        w = self._parameters  # an attribute of a module that is a parameter takes ten times as long
        return ops.low_rank_attention(
            x, w["wq"], w["bq"], w["wk"], w["wv"], w["wo"], w["bo"], self.num_heads, self.scale,
            causal_mask(attn_mask, x, is_causal), epsilon=self.epsilon, residual=x)

    def first_token(self, x: Tensor) -> Tensor:
        """The first token of the result, (B, 1, d)."""
        return inference.class_attention(
            x, self.wq, self.bq, self.wk, self.wv, self.wo, self.bo, self.num_heads, self.scale,
            self.epsilon)


class FusedMlp(nn.Module):
    """x + ls · mlp(norm(x))."""

    def __init__(self, norm: nn.LayerNorm, mlp: LowRankMlp, scale: nn.Module) -> None:
        super().__init__()
        affine, gamma = _affine(norm), _layer_scale(scale, mlp.fc2.u)
        v1, u1, u2 = (w.detach().double() for w in (mlp.fc1.v, mlp.fc1.u, mlp.fc2.u))
        self.activation, self.epsilon = mlp.activation, affine.epsilon
        factors = MlpFactors(affine.weight.unsqueeze(1) * v1, u1,
                             _bias(mlp.fc1) + u1 @ (affine.bias @ v1),
                             mlp.fc2.v.detach().double(), gamma.unsqueeze(1) * u2)
        like = mlp.fc1.v
        if like.is_cpu and like.dtype == torch.float32:  # fewer digits would be rounded once more
            factors = identity_gauge(factors)
        _set_weights(self, like, **factors._asdict(), b2=gamma * _bias(mlp.fc2))

    def forward(self, x: Tensor) -> Tensor:
        w = self._parameters
        return ops.low_rank_mlp(x, w["v1"], w["u1"], w["b1"], w["v2"], w["u2"], w["b2"],
                                self.activation, epsilon=self.epsilon, residual=x)


class FusedDenseMlp(nn.Module):
    """x + ls · mlp(norm(x)), mlp timm's."""

    def __init__(self, norm: nn.LayerNorm, mlp: Mlp, scale: nn.Module) -> None:
        super().__init__()
        affine, gamma = _affine(norm), _layer_scale(scale, mlp.fc2.weight)
        w1, w2 = (linear.weight.detach().double() for linear in (mlp.fc1, mlp.fc2))
        self.activation, self.epsilon = activation_name(mlp.act), affine.epsilon
        _set_weights(self, mlp.fc1.weight, w1=w1 * affine.weight,
                     b1=_bias(mlp.fc1) + w1 @ affine.bias,
                     w2=gamma.unsqueeze(1) * w2, b2=gamma * _bias(mlp.fc2))

    def forward(self, x: Tensor) -> Tensor:
        w = self._parameters
        return ops.dense_mlp(x, w["w1"], w["b1"], w["w2"], w["b2"], self.activation,
                             epsilon=self.epsilon, residual=x)


class Sublayer(nn.Module):
    """x + ls · f(norm(x)) where f stays what it is."""

    def __init__(self, norm: nn.Module, inner: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.scale = norm, inner, scale

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        return x + self.scale(self.inner(self.norm(x), **kwargs))


class FusedPatches(nn.Conv2d):
    """A convolution whose kernel is as large as its stride."""

    def forward(self, image: Tensor) -> Tensor:
        rows = image.shape[2] // self.kernel_size[0]
        # (B, out, rows, columns), laid out patch after patch: timm's flatten copies nothing.
        return inference.patch_embedding(image, self.weight, self.bias).mT.unflatten(2, (rows, -1))


class FewRowsLinear(nn.Linear):
    """A linear layer that mostly meets a few rows: a head, in small batches."""

    def forward(self, x: Tensor) -> Tensor:
        return inference.linear(x, self.weight, self.bias)


class FirstTokenVisionTransformer(VisionTransformer):
    """A timm ``VisionTransformer`` whose head reads the class token only: of the last block
    nothing else is computed. ``forward_features`` still returns all tokens."""

    embedding: nn.Parameter | None  # (1, tokens, d): what every image has before its patches

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            return super().forward(x, attn_mask, is_causal)
        *first, last = self.blocks
        x = self.norm_pre(self.patch_drop(self._tokens(x)))
        for block in first:
            x = block(x)
        return self.forward_head(self.norm(last.mlp(last.attn.first_token(x))))

    def set_input_size(self, *args: object, **kwargs: object) -> None:
        super().set_input_size(*args, **kwargs)
        self.embedding = _embedding(self)

    def _tokens(self, image: Tensor) -> Tensor:
        if self.embedding is None or image.shape[-2:] != self.patch_embed.img_size:
            return self._pos_embed(self.patch_embed(image))
        proj, own = self.patch_embed.proj, self.embedding[0]
        prefix, positions = own[:self.num_prefix_tokens], own[self.num_prefix_tokens:]
        return inference.patch_embedding(image, proj.weight, proj.bias, prefix, positions)


def meet_few_rows_(head: nn.Module) -> None:
    """Makes a linear layer one for few rows, in place; anything else stays what it is."""
    if type(head) is nn.Linear:
        head.__class__ = FewRowsLinear


@torch.no_grad()
def _embedding(model: VisionTransformer) -> nn.Parameter | None:
    """What the model adds to empty patches, and its prefix; None where that is not all it does."""
    patches = model.patch_embed
    if not (type(patches) is PatchEmbed and type(patches.proj) is FusedPatches
            and patches.grid_size is not None and type(patches.norm) is nn.Identity):
        return None
    zeros = patches.proj.weight.new_zeros(1, *patches.grid_size, patches.proj.out_channels)
    if not model.dynamic_img_size:
        zeros = zeros.flatten(1, 2)
    return nn.Parameter(model._pos_embed(zeros), requires_grad=False)


def _affine(norm: nn.Module) -> Norm | None:
    """None where it is not a layer norm over the last dimension."""
    if type(norm) not in (nn.LayerNorm, LayerNorm) or len(norm.normalized_shape) != 1:
        return None
    width = norm.normalized_shape[0]
    weight = torch.ones(width) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.detach()
    return Norm(weight.double(), bias.double(), norm.eps)


def _projections(attn: LowRankAttention | Attention) -> Projections:
    if type(attn) is LowRankAttention:
        return Projections(*(w.detach().double() for w in (attn.wq, attn.bq, attn.wk, attn.wv,
                                                           attn.wo, attn.bo)))
    w = attention_weights(attn)
    wq, bq, wk, wv, bv = (t.double().flatten(0, 1) for t in (w.wq, w.bq, w.wk, w.wv, w.bv))
    wo = w.wo.double().transpose(0, 1).flatten(1)
    return Projections(wq, bq, wk, wv, wo, w.bo.double() + wo @ bv)


def _layer_scale(scale: nn.Module, like: Tensor) -> Tensor:
    if isinstance(scale, LayerScale):
        return scale.gamma.detach().double()
    return like.new_ones(like.shape[0], dtype=torch.float64)


def _bias(linear: LowRankLinear | nn.Linear) -> Tensor:
    if linear.bias is None:
        device = next(linear.parameters()).device
        return torch.zeros(linear.out_features, dtype=torch.float64, device=device)
    return linear.bias.detach().double()


def _set_weights(module: nn.Module, like: Tensor, **weights: Tensor) -> None:
    for name, weight in weights.items():
        parameter = nn.Parameter(weight.to(like).contiguous(), requires_grad=False)
        module.register_parameter(name, parameter)


def _join_(*weights: nn.Parameter) -> None:
    """Lets the rows of all lie in one matrix, one after the other: one product serves them."""
    parts = torch.cat([w.data for w in weights]).split([len(w) for w in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part
