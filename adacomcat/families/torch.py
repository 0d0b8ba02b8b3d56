"""PyTorch: ``nn.MultiheadAttention``, MLPs in an ``nn.Sequential``, and encoder layers."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from adacomcat.layers.attention import Context, LowRankAttention
from adacomcat.layers.mlp import add_activation, is_elementwise
from adacomcat.layers.plain import altered_inside, is_ordinary, is_plain
from adacomcat.layers.registry import (
    AttentionFamily,
    AttentionParts,
    MlpParts,
    Projection,
    Tier,
    add_attention,
    add_holder,
    add_mlp,
)
from adacomcat.layers.stock import PlainAttention, softmax_weights

Result = tuple[Tensor, Tensor | None]


class _Multihead:
    """What both low-rank forms share: the arguments and the layout of ``nn.MultiheadAttention``."""

    # Layers of PyTorch ask for these before they take a fused path that reads dense weights.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    num_heads: int
    batch_first: bool

    def rows(self, x: Tensor) -> Tensor:
        """(B, N, d), whatever the layout of x."""
        if x.ndim == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def laid_out(self, y: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``rows``; ``like``: what was given to it."""
        if like.ndim == 2:
            return y.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1)

    def mask(self, like: Tensor, key_padding_mask: Tensor | None = None,
             attn_mask: Tensor | None = None) -> Tensor | None:
        """What is added to the logits (B, H, L, S): PyTorch's boolean masks are true where a token
        is not seen."""
        found: Tensor | None = None
        if attn_mask is not None:
            found = _added(attn_mask, like)
            if found.ndim == 3:
                found = found.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, like)[..., None, None, :]
            found = padding if found is None else found + padding
        return found


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if not mask.is_floating_point():
        mask = like.new_zeros(mask.shape).masked_fill_(mask.bool(), float("-inf"))
    return mask.to(like.dtype)


class PlainMultiheadAttention(_Multihead, PlainAttention):
    """The same in PyTorch's own modules."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor,
                key_padding_mask: Tensor | None = None, need_weights: bool = True,
                attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> Result:
        mask = self.mask(query, key_padding_mask, attn_mask)
        q, k, v = (self.heads(project(self.rows(x))) for project, x in (
            (self.q, query), (self.k, key), (self.v, value)))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0)
        y = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        weights = softmax_weights(q, k, self.scale, mask) if need_weights else None
        return self.laid_out(y, query), _shown(weights, query, average_attn_weights)


class LowRankMultiheadAttention(_Multihead, LowRankAttention):
    """Tier A with the arguments of ``nn.MultiheadAttention``; queries may be other tokens.

    Where the weights are asked for, they are computed a second time.
    """

    plain = PlainMultiheadAttention
    only_masks = True

    def adopt(self, attn: Any) -> None:
        self.batch_first, self.embed_dim = attn.batch_first, attn.embed_dim

    def attended(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
                 ) -> tuple[Tensor, Context] | None:
        if not query is key is value:
            return None
        return self.rows(query), self.score_context(query, *args, **kwargs)

    def score_context(self, x: Tensor, key_padding_mask: Tensor | None = None,
                      need_weights: bool = True, attn_mask: Tensor | None = None,
                      **others: Any) -> Context:
        return self.mask(x, key_padding_mask, attn_mask), None

    def forward(self, query: Tensor, key: Tensor, value: Tensor,
                key_padding_mask: Tensor | None = None, need_weights: bool = True,
                attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> Result:
        mask, weights = self.mask(query, key_padding_mask, attn_mask), None
        if query is key is value:
            y = self.attend(self.rows(query), mask)
        else:
            y = self._crossed(self.rows(query), self.rows(key), self.rows(value), mask)
        if need_weights:
            q, k = (self._heads(F.linear(self.rows(x), weight, bias)) for x, weight, bias in (
                (query, self.wq, self.bq), (key, self.wk, None)))
            weights = softmax_weights(q, k, self.scale, mask)
        return self.laid_out(y, query), _shown(weights, query, average_attn_weights)

    def _crossed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        q = self._heads(F.linear(query, self.wq, self.bq))
        k, v = (self._heads(F.linear(x, weight)) for x, weight in (
            (key, self.wk), (value, self.wv)))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(F.linear(y.transpose(1, 2).flatten(2), self.wo, self.bo))


def _shown(weights: Tensor | None, query: Tensor, average: bool) -> Tensor | None:
    """The weights as PyTorch returns them: (B, L, S), of each head (B, H, L, S); without B where
    the query has none."""
    if weights is None:
        return None
    weights = weights.mean(1) if average else weights
    return weights.squeeze(0) if query.ndim == 2 else weights


def self_attention(inner: nn.Module, x: Tensor, attn_mask: Tensor | None = None,
                   is_causal: bool = False) -> Tensor:
    """How blocks call it; dense, or low-rank."""
    return inner(x, x, x, need_weights=False, attn_mask=attn_mask)[0]


def _parts(attn: nn.MultiheadAttention) -> AttentionParts:
    weights = attn.in_proj_weight.detach().chunk(3)
    biases = [None] * 3 if attn.in_proj_bias is None else attn.in_proj_bias.detach().chunk(3)
    q, k, v = (Projection(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    out = attn.out_proj
    bias = None if out.bias is None else out.bias.detach()
    return AttentionParts(q, k, v, Projection(out.weight.detach(), bias), attn.num_heads,
                          attn.head_dim ** -0.5, attn.dropout)


def _tier(attn: Any, model: nn.Module | None) -> Tier | None:
    alike = attn.in_proj_weight is not None and attn.bias_k is None and not attn.add_zero_attn
    return "A" if alike else None


def _plain(attn: nn.MultiheadAttention) -> bool:
    own = (attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias)
    return (is_plain(attn.out_proj, NonDynamicallyQuantizableLinear)
            and all(parameter is None or is_ordinary(parameter) for parameter in own))


def sequential_mlp(module: nn.Sequential) -> MlpParts | None:
    """Linear, activation and linear, with dropouts behind the latter two or none."""
    layers = {name: layer for name, layer in module.named_children()
              if not is_plain(layer, nn.Dropout)}
    if len(layers) != 3:
        return None
    (first, fc1), (_, act), (second, fc2) = layers.items()
    fits = (is_elementwise(act)
            and getattr(fc1, "out_features", None) == getattr(fc2, "in_features", 0))
    if not fits:
        return None
    names = list(dict(module.named_children()))
    behind = module.get_submodule(names[names.index(second) - 1])
    drop = behind.p if isinstance(behind, nn.Dropout) else 0.0
    return MlpParts(fc1, act, fc2, drop, plain=not altered_inside(act) and is_plain(
        module, type(module)), names=(first, second))


def _leave_fast_path(layer: Any, ranks: Any) -> None:
    """The fused path of PyTorch reads dense weights."""
    if not _dense(layer):
        layer.activation_relu_or_gelu = 0


def _leave_nested_tensors(encoder: Any, ranks: Any) -> None:
    if not all(_dense(layer) for layer in encoder.layers):
        encoder.use_nested_tensor = False


def _dense(layer: Any) -> bool:
    return (type(layer.self_attn) is nn.MultiheadAttention
            and type(layer.linear1) is type(layer.linear2) is nn.Linear)


for _kind in (nn.Tanh, nn.Sigmoid, nn.ReLU6, nn.Hardswish, nn.Mish, nn.LeakyReLU, nn.ELU,
              nn.Softplus, nn.Identity):
    add_activation(_kind)
add_attention(nn.MultiheadAttention, AttentionFamily(
    _parts, {"A": LowRankMultiheadAttention}, _tier, _plain))
add_mlp(nn.Sequential, sequential_mlp)
add_holder(nn.TransformerEncoderLayer, _leave_fast_path)
add_holder(nn.TransformerEncoder, _leave_nested_tensors)
