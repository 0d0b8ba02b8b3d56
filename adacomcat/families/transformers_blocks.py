"""Layers of transformers as ``optimize`` sees them: their halves, and what takes their place."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import (
    modeling_dinov2_with_registers as registers,
)
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from adacomcat.errors import UserError
from adacomcat.layers.attention import ValueFoldedAttention, masked_context
from adacomcat.layers.folding import AffineMap, is_affine
from adacomcat.layers.fused import (
    FusedAttention,
    FusedGatedMlp,
    FusedRotaryAttention,
    fuses_rotary,
)
from adacomcat.layers.mlp import activation_name
from adacomcat.layers.named_block import NamedBlock
from adacomcat.layers.plain import altered, is_plain
from adacomcat.layers.registry import BlockParts, Residual

Fuse = Callable[[Residual], nn.Module]
_GATED = (dinov2.Dinov2SwiGLUFFN, registers.Dinov2WithRegistersSwiGLUFFN, dinov3.DINOv3ViTGatedMLP)


def mask_of(x: Tensor, mask: Any, is_causal: bool) -> Tensor | None:
    """What the models hand to their attentions, whichever implementation it was made for.

    None or (B, 1, N, N), boolean or added; a kernel that takes no mask gets (B, N), 1 for a token
    that is seen. Without a mask, a causal attention sees the tokens before each one.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise UserError(f"a low-rank attention takes no {type(mask).__name__}; load the model with "
                        "attn_implementation='sdpa' or 'eager'")
    if mask is not None and mask.ndim == 2:
        mask = mask.bool()[:, None, None]
    found, _ = masked_context(x, mask, is_causal and mask is None)
    return found


def _refuse_weights(arguments: dict[str, Any]) -> None:
    if arguments.get("output_attentions"):
        raise UserError("the fused kernels of an optimized model write no attention weights; "
                        "ask the model that adacomcat.optimize was given")


class FusedRotaryTokens(FusedRotaryAttention):
    """DINOv3: the call brings (cos, sin), (patches, head_dim) each."""

    def __init__(self, part: Residual) -> None:
        super().__init__(part, half=True)

    def forward(self, x: Tensor, attention_mask: Any = None, is_causal: bool | None = None,
                position_embeddings: Any = None, **kwargs: Any) -> Tensor:
        _refuse_weights(kwargs)
        cos, sin = (None, None) if position_embeddings is None else position_embeddings
        return self.attend(x, sin, cos, mask_of(x, attention_mask, bool(is_causal)))


class FusedLayer(NamedBlock):
    """A pre-norm layer in eval mode, with the arguments of those of transformers."""

    def __init__(self, attn: nn.Module, mlp: nn.Module, attention: str, layer: nn.Module) -> None:
        super().__init__(attn, mlp, attention)
        keep_recorders(self, layer)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None,
                is_causal: bool | None = None, **kwargs: Any) -> Tensor:
        attn = self.attn
        if not isinstance(attn, FusedAttention):
            kwargs |= {} if is_causal is None else {"is_causal": is_causal}
            return self.mlp(attn(hidden_states, attention_mask=attention_mask, **kwargs))
        _refuse_weights(kwargs)
        mask = mask_of(hidden_states, attention_mask, bool(is_causal))
        return self.mlp(attn(hidden_states, attn_mask=mask))


def keep_recorders(made: nn.Module, dense: nn.Module) -> None:
    """Hooks by which transformers records outputs; it attaches them once to a model."""
    made._forward_hooks.update(dense._forward_hooks)


def _first(inner: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """How layers call their attention."""
    return inner(x, **kwargs)[0]


def _mlp(inner: Any, x: Tensor, **kwargs: Any) -> Tensor:
    return inner(x)


def block_parts_of(layer: Any, names: tuple[str, str, str], fused: type[FusedLayer]
                 ) -> BlockParts | None:
    """``names``: of the attention and of the two norms."""
    attention, *norms = names
    scales = [getattr(layer, f"layer_scale{half}", nn.Identity()) for half in (1, 2)]
    if any(map(altered, scales)):
        return None
    gammas = [getattr(scale, "lambda1", None) for scale in scales]
    halves = [Residual(name, getattr(layer, norm), getattr(layer, name), scale,
                       None if gamma is None else gamma.detach(), run)
              for name, norm, scale, gamma, run in zip(
                  (attention, "mlp"), norms, scales, gammas, (_first, _mlp), strict=True)]
    fuses = _fuse_attention(halves[0].inner), _fuse_mlp(halves[1].inner)
    halves = [replace(half, fuse=fuse) for half, fuse in zip(halves, fuses, strict=True)]
    return BlockParts(halves[0], halves[1],
                      partial(fused, attention=attention, layer=layer))


def _fuse_attention(attn: Any) -> Fuse | None:
    rotary = isinstance(attn, ValueFoldedAttention | dinov3.DINOv3ViTAttention)
    return FusedRotaryTokens if rotary and fuses_rotary(attn) else None


def _fuse_mlp(mlp: Any) -> Fuse | None:
    gated = is_plain(mlp, *_GATED) and activation_name(mlp.act_fn) is not None
    maps = (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if gated else ()
    return _fused_gated if gated and all(map(is_affine, maps)) else None


def _fused_gated(part: Residual) -> nn.Module:
    mlp = part.inner
    gate, up, down = map(AffineMap.of, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return FusedGatedMlp(part, gate, up, down, mlp.act_fn)
