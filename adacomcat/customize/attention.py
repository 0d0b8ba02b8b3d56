"""diffusers' attentions with adapters: which are supported, and the processors that run them.

Nothing here imports diffusers: its classes are known by their names, and a processor is any
callable with the attention as its first argument.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from adacomcat.customize.adapter import (
    TEXT,
    TOKENS,
    AdapterStack,
    Linear,
    Projections,
    attend,
    merged,
    project,
    split_heads,
    widen_keys,
    widen_queries,
    widen_values,
)

# Name of diffusers' processor → the kind of attention that it runs.
_KINDS = {"AttnProcessor": "plain", "AttnProcessor2_0": "plain",
          "JointAttnProcessor2_0": "joint", "FluxAttnProcessor": "flux"}


def attention_kind(module: nn.Module) -> str | None:
    """'plain', 'joint' or 'flux' where adapters can stand beside this attention; else None.

    plain: UNet2DConditionModel, DiT, PixArt. joint: Stable Diffusion 3. flux: the double blocks
    of Flux; its single blocks project values and MLP together and are left as they are.
    """
    processor = getattr(module, "processor", None)
    if isinstance(processor, AdaptedProcessor):
        return processor.kind
    kind = _KINDS.get(type(processor).__name__)
    names = ("to_q", "to_k", "to_v", "to_out")
    projections: list[Any] = [getattr(module, name, None) for name in names]
    q, k, v, out = projections
    if kind is None or out is None or getattr(module, "fused_projections", False):
        return None
    linear = all(isinstance(projection, Linear) for projection in (q, k, v, out[0]))
    # Otherwise heads share keys.
    return kind if linear and q.out_features == k.out_features else None


def projections_of(attention: Any) -> dict[str, Projections]:
    """Kind of tokens → the frozen projections of an attention."""
    found = {TOKENS: Projections(attention.to_q, attention.to_k, attention.to_v,
                                 attention.to_out[0])}
    if getattr(attention, "add_k_proj", None) is not None:
        found[TEXT] = Projections(attention.add_q_proj, attention.add_k_proj,
                                  attention.add_v_proj, getattr(attention, "to_add_out", None))
    return found


def adapts_queries(attention: Any) -> bool:
    """Whether queries and keys meet without a norm or a rotation between."""
    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    return attention_kind(attention) != "flux" and \
        all(getattr(attention, name, None) is None for name in norms)


class Heads(NamedTuple):
    """Queries, keys and values (B, H, L, width) of one kind of tokens."""

    q: Tensor
    k: Tensor
    v: Tensor


class AdaptedProcessor(AdapterStack):
    """The processor of an attention with adapters.

    ``original`` runs where all have α = 0, and without gradients where their factors are zero.

    Args:
        attention: one of this ``kind``.
    """

    kind: ClassVar[str]

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.original: Callable[..., Any] = attention.processor

    def _heads(self, attn: Any, names: tuple[str, str, str], x: Tensor, context: Tensor,
               norms: tuple[str, str]) -> Heads:
        """The frozen projections' heads, normalised where the attention does."""
        inputs = zip(names, (x, context, context), strict=True)
        heads = [split_heads(getattr(attn, name)(tokens), attn.heads) for name, tokens in inputs]
        for at, name in enumerate(norms):
            norm = getattr(attn, name, None)
            if norm is not None:
                heads[at] = norm(heads[at])
        return Heads(*heads)

    def _widened(self, heads: Heads, x: Tensor, context: Tensor, tokens: str) -> Heads:
        active = self.active(tokens)
        return Heads(widen_queries(heads.q, x, active), widen_keys(heads.k, context, active),
                     widen_values(heads.v, context, active))

    def _out(self, attn: Any, attended: Tensor) -> Tensor:
        """The output projection with its dropout."""
        return attn.to_out[1](project(attended, attn.to_out[0], self.active(TOKENS)))

    def _pictures(self, attn: Any, x: Tensor) -> Heads:
        heads = self._heads(attn, ("to_q", "to_k", "to_v"), x, x, ("norm_q", "norm_k"))
        return self._widened(heads, x, x, TOKENS)

    def _text(self, attn: Any, text: Tensor) -> Heads:
        heads = self._heads(attn, ("add_q_proj", "add_k_proj", "add_v_proj"), text, text,
                            ("norm_added_q", "norm_added_k"))
        return self._widened(heads, text, text, TEXT)


class _PlainProcessor(AdaptedProcessor):
    """Self attention or cross attention over tokens (B, L, C), or pictures (B, C, H, W)."""

    kind = "plain"

    def __call__(self, attn: Any, hidden_states: Tensor,
                 encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
        x, context, mask = hidden_states, encoder_hidden_states, attention_mask
        if not self.active(TOKENS):
            return self.original(attn, x, context, mask, temb)
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if mask is not None:
            keys = x if context is None else context
            mask = attn.prepare_attention_mask(mask, keys.shape[1], len(keys))
            mask = mask.view(len(keys), attn.heads, -1, mask.shape[-1])
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if context is None:
            context = x
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        heads = self._heads(attn, ("to_q", "to_k", "to_v"), x, context, ("norm_q", "norm_k"))
        out = self._out(attn, attend(*self._widened(heads, x, context, TOKENS), attn.scale, mask))
        if hidden_states.ndim == 4:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class _JointProcessor(AdaptedProcessor):
    """Pictures and text attend to both together; without text, pictures to themselves."""

    kind = "joint"

    def __call__(self, attn: Any, hidden_states: Tensor,
                 encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None) -> Any:
        x, text = hidden_states, encoder_hidden_states
        if not self.active(TOKENS):
            return self.original(attn, x, text, attention_mask)
        if text is None:
            return self._out(attn, attend(*self._pictures(attn, x), attn.scale))
        both = zip(self._pictures(attn, x), self._text(attn, text), strict=True)
        q, k, v = (torch.cat(pair, 2) for pair in both)
        attended = attend(q, k, v, attn.scale)
        pictures, words = attended.split([x.shape[1], text.shape[1]], 2)
        if attn.context_pre_only:  # nothing reads what becomes of the text
            return self._out(attn, pictures), text
        return self._out(attn, pictures), project(words, attn.to_add_out, self.active(TEXT))


class _FluxProcessor(AdaptedProcessor):
    """As in joint attention; text stands before pictures, and queries and keys are rotated."""

    kind = "flux"

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor,
                 attention_mask: Tensor | None = None, image_rotary_emb: Any = None) -> Any:
        from diffusers.models.embeddings import apply_rotary_emb
        x, text = hidden_states, encoder_hidden_states
        if not self.active(TOKENS):
            return self.original(attn, x, text, attention_mask, image_rotary_emb)
        both = zip(self._text(attn, text), self._pictures(attn, x), strict=True)
        q, k, v = (torch.cat(pair, 2) for pair in both)
        if image_rotary_emb is not None:
            rotate: Any = apply_rotary_emb
            q, k = (torch.cat([rotate(part[..., :attn.head_dim], image_rotary_emb),
                               part[..., attn.head_dim:]], -1) for part in (q, k))
        attended = attend(q, k, v, attn.head_dim**-0.5, attention_mask)
        words, pictures = attended.split([text.shape[1], x.shape[1]], 2)
        return self._out(attn, pictures), project(words, attn.to_add_out, self.active(TEXT))


def adapted_processor(attention: Any) -> AdaptedProcessor:
    """The processor for adapters of an attention that has a kind."""
    kinds = {found.kind: found for found in (_PlainProcessor, _JointProcessor, _FluxProcessor)}
    return kinds[str(attention_kind(attention))](attention)


def merge_attention_(attention: Any) -> None:
    """Replace the projections of an adapted attention by dense ones with the wider heads."""
    processor = attention.processor
    wide = {tokens: merged(frozen, attention.heads, attention.scale, processor.active(tokens))
            for tokens, frozen in projections_of(attention).items()}
    attention.set_processor(processor.original)
    main = wide[TOKENS]
    attention.to_q, attention.to_k, attention.to_v = main.q, main.k, main.v
    attention.to_out[0] = main.out
    if TEXT in wide:
        text = wide[TEXT]
        attention.add_q_proj, attention.add_k_proj, attention.add_v_proj = text[:3]
        attention.to_add_out = text.out
    attention.inner_dim = attention.inner_kv_dim = main.q.out_features
    attention.scale = (main.q.out_features // attention.heads) ** -0.5
