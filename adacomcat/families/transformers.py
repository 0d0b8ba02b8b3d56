"""Hugging Face transformers: its Vision Transformers, and what its models keep of a compression.

ViT, DeiT, DINOv2 with and without registers, DINOv3, CLIP, SigLIP and SigLIP 2 have pre-norm
layers of the same kind under different names; Swin attends in windows. The drop-ins derive from
the dense classes too, since transformers finds by class whose outputs it records.
"""

import inspect
import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import (
    ClippedGELUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
    SiLUActivation,
)
from transformers.models.clip import modeling_clip as clip
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import (
    modeling_dinov2_with_registers as registers,
)
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2
from transformers.models.swin import modeling_swin as swin
from transformers.models.vit import modeling_vit as vit

from adacomcat.entrypoint.transformers import keep_plan
from adacomcat.errors import UserError
from adacomcat.families.timm_plain import window_mask
from adacomcat.families.transformers_blocks import (
    FusedLayer,
    block_parts_of,
    keep_recorders,
    mask_of,
)
from adacomcat.layers.attention import Context, LowRankAttention, ValueFoldedAttention
from adacomcat.layers.mlp import add_activation
from adacomcat.layers.plain import is_plain
from adacomcat.layers.registry import (
    AttentionFamily,
    AttentionParts,
    EncoderParts,
    MlpParts,
    Projection,
    Tier,
    add_attention,
    add_block,
    add_encoder,
    add_example,
    add_holder,
    add_mlp,
    add_patch_projection,
)
from adacomcat.layers.stock import PlainAttention, softmax_weights
from adacomcat.utils.inputs import Batch, Inputs, call
from adacomcat.utils.model import input_size

Result = tuple[Tensor, Tensor | None]


class _Arguments:
    """The arguments and results of an attention of transformers."""

    scale: float
    is_causal: bool
    config: Any

    def adopt(self, attn: Any) -> None:
        cast(Any, super()).adopt(attn)
        self.config, self.is_causal = attn.config, attn.is_causal
        keep_recorders(cast(nn.Module, self), attn)

    def attended(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any
                 ) -> tuple[Tensor, Context]:
        return hidden_states, self.score_context(hidden_states, attention_mask, **kwargs)

    def score_context(self, x: Tensor, attention_mask: Any = None, is_causal: bool | None = None,
                      **kwargs: Any) -> Context:
        causal = self.is_causal if is_causal is None else is_causal
        return mask_of(x, attention_mask, causal), None

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Result:
        """The second result are the weights, where the caller asks for 'attentions'."""
        mask, rope = self.score_context(hidden_states, attention_mask, **kwargs)
        y = cast(Any, self).attend(hidden_states, mask, rope)
        if not kwargs.get("output_attentions"):
            return y, None
        q, k = cast(Any, self).queries_and_keys(hidden_states, rope)
        return y, softmax_weights(q, k, self.scale, mask)


class _PlainArguments(PlainAttention):
    """The same for the plain forms."""

    is_causal: bool

    def queries_and_keys(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.heads(self.q(x)), self.heads(self.k(x))

    def added(self, x: Tensor, attention_mask: Any, is_causal: bool | None) -> Tensor | None:
        return mask_of(x, attention_mask, self.is_causal if is_causal is None else is_causal)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None,
                is_causal: bool | None = None, **kwargs: Any) -> Result:
        q, k = self.queries_and_keys(hidden_states, **kwargs)
        mask = self.added(hidden_states, attention_mask, is_causal)
        weights = None
        if kwargs.get("output_attentions"):
            weights = softmax_weights(q, k, self.scale, mask)
        return self.attend(hidden_states, q, k, mask), weights


class PlainWindows(_PlainArguments):
    """Swin."""

    relative_position_bias: nn.Module

    def added(self, x: Tensor, attention_mask: Any, is_causal: bool | None) -> Tensor | None:
        return window_mask(x, self.relative_position_bias(), attention_mask)


class PlainRotary(_PlainArguments):
    """DINOv3."""

    def queries_and_keys(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = super().queries_and_keys(x)
        return dinov3.apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])


class LowRankTokens(_Arguments, LowRankAttention):
    """Tier A: plain softmax attention under a mask."""

    plain = _PlainArguments


class LowRankWindows(LowRankTokens):
    """Tier A, Swin: a relative position bias in each window."""

    plain = PlainWindows
    relative_position_bias: nn.Module

    def adopt(self, attn: Any) -> None:
        super().adopt(attn)
        self.relative_position_bias = attn.relative_position_bias

    def score_context(self, x: Tensor, attention_mask: Any = None, is_causal: bool | None = None,
                      **kwargs: Any) -> Context:
        return window_mask(x, self.relative_position_bias(), attention_mask), None


class LowRankRotary(_Arguments, ValueFoldedAttention):
    """Tier B, DINOv3: a rotary embedding, (cos, sin), turns queries and keys."""

    plain = PlainRotary

    def queries_and_keys(self, x: Tensor, rope: Any = None) -> tuple[Tensor, Tensor]:
        q, k = self._heads(self.q(x)), self._heads(self.k(x))
        return (q, k) if rope is None else dinov3.apply_rotary_pos_emb(q, k, *rope)

    def score_context(self, x: Tensor, attention_mask: Any = None, is_causal: bool | None = None,
                      position_embeddings: Any = None, **kwargs: Any) -> Context:
        mask, _ = super().score_context(x, attention_mask, is_causal)
        return mask, position_embeddings


class _Entered(Exception):
    """Ends a forward pass where the first layer begins."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


def _entering(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    hidden_states, *masks = (*args, kwargs.get("attention_mask"))
    if any(mask is not None for mask in masks):
        raise UserError("calibration shows this model whole images: leave out attention_mask")
    raise _Entered(hidden_states)


def _tokens(model: nn.Module, layers: str, inputs: Inputs) -> Tensor:
    """What enters the first layer."""
    first = cast(nn.ModuleList, model.get_submodule(layers))[0]
    handle = first.register_forward_pre_hook(_entering, with_kwargs=True)
    try:
        call(model, inputs)
    except _Entered as entered:
        return entered.tokens
    finally:
        handle.remove()
    raise UserError(f"{type(model).__name__} does not run its layers")


def _step(layer: nn.Module, tokens: Tensor) -> Tensor:
    return layer(tokens, None)


def _encoder_parts(model: nn.Module, layers: str) -> EncoderParts | None:
    blocks = cast(nn.ModuleList, model.get_submodule(layers))
    if not len(blocks):
        return None
    return EncoderParts(layers, blocks, partial(_tokens, model, layers), None, _step)


def _either(module: nn.Module, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _attention_parts(attn: Any) -> AttentionParts:
    out = _either(attn, "o_proj", "out_proj")
    q, k, v = (Projection.of(part) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    return AttentionParts(q, k, v, Projection.of(out),
                          _either(attn, "num_attention_heads", "num_heads"),
                          _either(attn, "scaling", "scale"),
                          _either(attn, "attention_dropout", "dropout"))


def _mlp_parts(mlp: Any) -> MlpParts:
    return MlpParts(mlp.fc1, mlp.activation_fn, mlp.fc2, 0.0, is_plain(mlp, type(mlp)))


def _projection_mlp_parts(mlp: Any) -> MlpParts:
    return MlpParts(mlp.up_proj, mlp.act_fn, mlp.down_proj, 0.0, is_plain(mlp, type(mlp)),
                    ("up_proj", "down_proj"))


def _drop_in(form: type[nn.Module], dense: type[nn.Module]) -> Any:
    """A class of this module, so that pickle finds it, which derives from both."""
    name = f"{form.__name__}Of{dense.__name__}"
    made = type(name, (form, dense), {"__module__": __name__, "only_masks": form is LowRankTokens,
                                      "__doc__": f"{form.__name__} for {dense.__name__}."})
    globals()[name] = made
    return made


def _example(model: Any) -> Batch:
    """An image of the size that ``model`` was built for, and a text where it takes one."""
    names = inspect.signature(model.forward).parameters
    config = model.config
    picture = getattr(config, "vision_config", None) or config
    found: dict[str, Tensor] = {}
    if "input_ids" in names:
        text = getattr(config, "text_config", None) or config
        found["input_ids"] = torch.zeros(1, text.max_position_embeddings, dtype=torch.long)
    if "spatial_shapes" in names:
        side = math.isqrt(picture.num_patches)
        width = picture.num_channels * picture.patch_size ** 2
        found |= {"pixel_values": torch.zeros(1, side * side, width),
                  "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.long),
                  "spatial_shapes": torch.tensor([[side, side]])}
    elif "pixel_values" in names:
        found["pixel_values"] = torch.zeros(1, *input_size(model))
    return Batch((), found)


def _always(tier: Tier) -> Any:
    return lambda attn, model: tier


def _add(attention: type[nn.Module], layer: type[nn.Module], names: tuple[str, str, str],
         form: type[nn.Module] = LowRankTokens, tier: Tier = "A") -> None:
    add_attention(attention, AttentionFamily(
        _attention_parts, {tier: _drop_in(form, attention)}, _always(tier)))
    fused = _drop_in(FusedLayer, layer)
    add_block(layer, partial(block_parts_of, names=names, fused=fused))


_BEFORE = ("attention", "layernorm_before", "layernorm_after")
_FIRST = ("attention", "norm1", "norm2")
_SELF = ("self_attn", "layer_norm1", "layer_norm2")
_add(vit.ViTAttention, vit.ViTLayer, _BEFORE)
_add(deit.DeiTAttention, deit.DeiTLayer, _BEFORE)
_add(dinov2.Dinov2Attention, dinov2.Dinov2Layer, _FIRST)
_add(registers.Dinov2WithRegistersAttention, registers.Dinov2WithRegistersLayer, _FIRST)
_add(dinov3.DINOv3ViTAttention, dinov3.DINOv3ViTLayer, _FIRST, LowRankRotary, "B")
_add(clip.CLIPAttention, clip.CLIPEncoderLayer, _SELF)
_add(siglip.SiglipAttention, siglip.SiglipEncoderLayer, _SELF)
_add(siglip2.Siglip2Attention, siglip2.Siglip2EncoderLayer, _SELF)
add_attention(swin.SwinAttention, AttentionFamily(
    _attention_parts, {"A": _drop_in(LowRankWindows, swin.SwinAttention)}, _always("A")))
for _kind in (vit.ViTMLP, deit.DeiTMLP, dinov2.Dinov2MLP, registers.Dinov2WithRegistersMLP,
              clip.CLIPMLP, siglip.SiglipMLP, siglip2.Siglip2MLP, swin.SwinMLP):
    add_mlp(_kind, _mlp_parts)
add_mlp(dinov3.DINOv3ViTMLP, _projection_mlp_parts)
for _kind, _name in ((vit.ViTPatchEmbeddings, "projection"),
                     (deit.DeiTPatchEmbeddings, "projection"),
                     (dinov2.Dinov2PatchEmbeddings, "projection"),
                     (registers.Dinov2WithRegistersPatchEmbeddings, "projection"),
                     (dinov3.DINOv3ViTEmbeddings, "patch_embeddings"),
                     (clip.CLIPVisionEmbeddings, "patch_embedding"),
                     (siglip.SiglipVisionEmbeddings, "patch_embedding")):
    add_patch_projection(_kind, _name)
for _kind, _name in ((GELUActivation, "gelu"), (GELUTanh, "gelu_tanh"), (SiLUActivation, "silu"),
                     (QuickGELUActivation, "quick_gelu"), (NewGELUActivation, None),
                     (ClippedGELUActivation, None)):
    add_activation(_kind, _name)
for _kind, _name in (
        (vit.ViTModel, "layers"), (vit.ViTForImageClassification, "vit.layers"),
        (deit.DeiTModel, "layers"), (deit.DeiTForImageClassification, "deit.layers"),
        (dinov2.Dinov2Model, "encoder.layer"),
        (dinov2.Dinov2ForImageClassification, "dinov2.encoder.layer"),
        (registers.Dinov2WithRegistersModel, "encoder.layer"),
        (registers.Dinov2WithRegistersForImageClassification,
         "dinov2_with_registers.encoder.layer"),
        (clip.CLIPVisionModel, "encoder.layers"),
        (clip.CLIPVisionModelWithProjection, "vision_model.encoder.layers"),
        (clip.CLIPForImageClassification, "vision_model.encoder.layers"),
        (siglip.SiglipVisionModel, "encoder.layers"),
        (siglip.SiglipForImageClassification, "vision_model.encoder.layers")):
    add_encoder(_kind, partial(_encoder_parts, layers=_name))
add_holder(PreTrainedModel, keep_plan)
add_example(PreTrainedModel, _example)
