"""timm: its attentions, MLPs, blocks and Vision Transformers, and the drop-ins for them."""

from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    AttentionRope,
    DropPath,
    LayerScale,
    Mlp,
    PatchEmbed,
)
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as CosineAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.families import timm_blocks
from adacomcat.families.timm_plain import (
    BeitWindow,
    CosineWindow,
    PlainBeitAttention,
    PlainCosineAttention,
    PlainEvaAttention,
    PlainNormedAttention,
    PlainRotaryAttention,
    PlainWindowAttention,
    SwinWindow,
    continuous_bias,
    cosine_queries,
    position_bias,
    rotated,
    window_mask,
)
from adacomcat.layers.attention import (
    Context,
    LowRankAttention,
    ValueFoldedAttention,
    masked_context,
)
from adacomcat.layers.fused import ClassTokenEncoder, FusedBlock, FusedPatches, gemv_linear
from adacomcat.layers.plain import is_plain, is_plain_linear
from adacomcat.layers.registry import (
    AttentionFamily,
    AttentionParts,
    BlockParts,
    EncoderParts,
    MlpParts,
    Projection,
    Residual,
    Tier,
    TierOf,
    add_attention,
    add_block,
    add_encoder,
    add_mlp,
    add_patch_projection,
    add_position_network,
)
from adacomcat.ops import inference
from adacomcat.utils.model import ancestors


class _PositionBias(LowRankAttention):
    """A relative position bias stays, where there is one, added to the low-rank logits."""

    AREA: ClassVar[tuple[str, ...]]
    relative_position_bias_table: nn.Parameter | None  # (positions, H)
    relative_position_index: Tensor  # (area, area)

    def adopt(self, attn: Any) -> None:
        self.relative_position_bias_table = None
        if attn.relative_position_bias_table is not None:
            self.relative_position_bias_table = nn.Parameter(
                attn.relative_position_bias_table.detach().clone())
            self.register_buffer("relative_position_index", attn.relative_position_index.clone(),
                                 persistent=False)
        vars(self).update({name: getattr(attn, name, None) for name in self.AREA})


class LowRankWindowAttention(SwinWindow, _PositionBias):
    """Swin: attention in windows, each with the same bias."""

    plain = PlainWindowAttention

    def score_context(self, x: Tensor, mask: Tensor | None = None) -> Context:
        return window_mask(x, cast(Tensor, position_bias(self)), mask), None


class LowRankBeitAttention(BeitWindow, _PositionBias):
    """BEiT: the bias belongs to the layer, or the call brings one that all layers share."""

    plain = PlainBeitAttention

    def score_context(self, x: Tensor,
                      shared_rel_pos_bias: Tensor | None = None) -> Context:
        bias = position_bias(self)
        if shared_rel_pos_bias is not None:
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        return bias, None


class LowRankEvaAttention(LowRankAttention):
    """EVA without rotary embedding: tier A behind EVA's signature."""

    plain = PlainEvaAttention

    def score_context(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                      is_causal: bool = False) -> Context:
        if rope is not None:
            raise UserError("this attention was folded for a model without rotary embedding")
        return masked_context(x, attn_mask, is_causal)


class LowRankRotaryAttention(ValueFoldedAttention):
    """Tier B: norms and a rotary embedding stand behind q and k."""

    plain = PlainRotaryAttention
    q_norm: nn.Module
    k_norm: nn.Module
    num_prefix_tokens: int
    rotate_half: bool

    def adopt(self, attn: Any) -> None:
        super().adopt(attn)
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.num_prefix_tokens = getattr(attn, "num_prefix_tokens", 0)
        self.rotate_half = getattr(attn, "rotate_half", False)

    def queries_and_keys(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k = self.q_norm(self._heads(self.q(x))), self.k_norm(self._heads(self.k(x)))
        if rope is None:
            return q, k
        return (rotated(q, rope, self.num_prefix_tokens, self.rotate_half),
                rotated(k, rope, self.num_prefix_tokens, self.rotate_half))

    def score_context(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                      is_causal: bool = False) -> Context:
        mask, _ = masked_context(x, attn_mask, is_causal)
        return mask, rope


class LowRankNormedAttention(LowRankRotaryAttention):
    """Tier B with timm's ``Attention`` signature: normalised queries and keys, no rotation."""

    plain = PlainNormedAttention

    def score_context(self, x: Tensor, *args: Any, **kwargs: Any) -> Context:
        return masked_context(x, *args, **kwargs)


class LowRankCosineAttention(CosineWindow, ValueFoldedAttention):
    """Tier B, swin v2: cosine similarity times a learned scale, plus a learned position bias."""

    plain = PlainCosineAttention
    cpb_mlp: nn.Module
    relative_coords_table: Tensor
    relative_position_index: Tensor

    def adopt(self, attn: Any) -> None:
        super().adopt(attn)
        self.logit_scale = nn.Parameter(attn.logit_scale.detach().clone())
        self.cpb_mlp = attn.cpb_mlp
        for name in ("relative_coords_table", "relative_position_index"):
            self.register_buffer(name, getattr(attn, name).clone(), persistent=False)
        vars(self).update({name: getattr(attn, name) for name in self.AREA})

    def queries_and_keys(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (cosine_queries(self._heads(self.q(x)), self.logit_scale),
                F.normalize(self._heads(self.k(x)), dim=-1))

    def _bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table)
        return continuous_bias(table, self.relative_position_index)

    def score_context(self, x: Tensor, mask: Tensor | None = None) -> Context:
        return window_mask(x, self._bias(), mask), None


def _attention_parts(attn: Any) -> AttentionParts:
    if getattr(attn, "qkv", None) is not None:
        q, k, v = _split_qkv(attn)
    else:
        q, k, v = (Projection.of(p) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    # Swin v2 has no scale: its learned one multiplies the queries.
    return AttentionParts(q, k, v, Projection.of(attn.proj), attn.num_heads,
                          getattr(attn, "scale", 1.0), attn.attn_drop.p,
                          _probability(attn.proj_drop))


def _split_qkv(attn: Any) -> list[Projection]:
    """One fused linear layer; its bias is its own, or parameters beside it, none for the keys."""
    q, k, v = Projection.of(attn.qkv).split(3)
    if getattr(attn, "q_bias", None) is not None:
        q, v = q._replace(bias=attn.q_bias.detach()), v._replace(bias=attn.v_bias.detach())
    return [q, k, v]


def _plain_attention(attn: Any) -> bool:
    """Whether ``_attention_parts`` reads all that stands between the tokens and the result."""
    inner = [attn.qkv] if getattr(attn, "qkv", None) is not None else [
        attn.q_proj, attn.k_proj, attn.v_proj]
    return (all(map(is_plain_linear, (*inner, attn.proj))) and _is_dropout(attn.proj_drop)
            and is_plain(attn.attn_drop, nn.Dropout)
            and is_plain(getattr(attn, "softmax", nn.Softmax()), nn.Softmax))


def _is_dropout(module: nn.Module) -> bool:
    return is_plain(module, nn.Dropout, nn.Identity)


def _probability(dropout: nn.Module) -> float:
    """0 where an identity took the place of a dropout."""
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


def _present(attn: nn.Module, *names: str) -> bool:
    parts = [getattr(attn, name, None) for name in names]
    return any(part is not None and type(part) is not nn.Identity for part in parts)


def _folds_values(attn: nn.Module) -> bool:
    """Nothing stands between values and output projection, and no heads share keys and values."""
    return not _present(attn, "norm", "gate") and getattr(attn, "num_kv_groups", 1) == 1


def _tier(attn: nn.Module, model: nn.Module | None) -> Tier | None:
    if not _folds_values(attn):
        return None
    return "B" if _present(attn, "q_norm", "k_norm") else "A"


def _eva_tier(attn: nn.Module, model: nn.Module | None) -> Tier | None:
    """The model that owns the blocks hands its rotary embedding to every attention at call time.

    That owner may stand inside of another module, so the nearest one that has a ``rope`` is asked.
    Where there is none, whoever calls the blocks may bring an embedding, and tier B allows both.
    """
    if model is None or not _folds_values(attn):
        return _tier(attn, model)
    owner = next((above for above in ancestors(attn, model) if hasattr(above, "rope")), None)
    rotary = owner is None or owner.rope is not None
    return "B" if rotary else _tier(attn, model)


def _rotary_tier(attn: nn.Module, model: nn.Module | None) -> Tier | None:
    return "B" if _folds_values(attn) else None


def _mlp_parts(mlp: Any) -> MlpParts:
    plain = (is_plain(mlp, Mlp) and is_plain(mlp.norm, nn.Identity)
             and _is_dropout(mlp.drop1) and _is_dropout(mlp.drop2))
    return MlpParts(mlp.fc1, mlp.act, mlp.fc2, _probability(mlp.drop1), plain)


def _block_parts(block: Any) -> BlockParts | None:
    plain = (all(is_plain(scale, LayerScale, nn.Identity) for scale in (block.ls1, block.ls2))
             and all(is_plain(drop, DropPath, nn.Identity)
                     for drop in (block.drop_path1, block.drop_path2)))
    if not plain:
        return None
    return BlockParts(
        Residual("attn", block.norm1, block.attn, block.ls1, _gamma(block.ls1)),
        Residual("mlp", block.norm2, block.mlp, block.ls2, _gamma(block.ls2),
                 fuse=timm_blocks.fuse_gated(block.mlp)))


def _gamma(scale: nn.Module) -> Tensor | None:
    return scale.gamma.detach() if isinstance(scale, LayerScale) else None


def _encoder_parts(model: VisionTransformer) -> EncoderParts:
    def tokens(images: Tensor) -> Tensor:
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    reads_class_token = model.global_pool == "token" and model.attn_pool is None
    return EncoderParts("blocks", model.blocks, tokens,
                        partial(ClassTokenVisionTransformer, model) if reads_class_token else None)


class ClassTokenVisionTransformer(VisionTransformer, ClassTokenEncoder):
    """A ``VisionTransformer`` whose head reads the class token only: in the last block it computes
    nothing else. ``forward_features`` still returns all tokens.

    It takes over the parts of ``model``, which is no longer to be used, under their names. The last
    block is a ``FusedBlock`` whose attention is a ``FusedAttention``.
    """

    embedding: nn.Parameter | None  # (1, tokens, d): prefix tokens and positions, added once

    def __init__(self, model: VisionTransformer) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vars(model))
        self.head = gemv_linear(self.head)
        self.embedding = _embedding(self)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            return super().forward(x, attn_mask, is_causal)
        *first, last = self.blocks
        x = self.norm_pre(self.patch_drop(self._tokens(x)))
        for block in first:
            x = block(x)
        return self.forward_head(self.norm(cast(FusedBlock, last).class_token(x)))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """
        Raises:
            UserError: The pooling would read tokens that the last block does not compute.
        """
        if global_pool not in (None, self.global_pool):
            raise UserError("an optimized model computes only the class token in its last block, "
                            f"and pooling {global_pool!r:.40} reads others: reset the classifier "
                            "of the model that adacomcat.optimize was given")
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        super().set_input_size(*args, **kwargs)
        self.embedding = _embedding(self)

    def _tokens(self, image: Tensor) -> Tensor:
        if self.embedding is None or image.shape[-2:] != self.patch_embed.img_size:
            return self._pos_embed(self.patch_embed(image))
        proj, own = self.patch_embed.proj, self.embedding[0]
        prefix, positions = own[:self.num_prefix_tokens], own[self.num_prefix_tokens:]
        return inference.patch_embedding(image, proj.weight, proj.bias, prefix, positions)


@torch.no_grad()
def _embedding(model: VisionTransformer) -> nn.Parameter | None:
    """(1, tokens, d): the tokens of an image whose patches are all zero.

    The tokens of other images differ by their projected patches only. None where the patch
    embedding does more than project patches that do not overlap.
    """
    patches = model.patch_embed
    if not (is_plain(patches, PatchEmbed) and is_plain(patches.proj, FusedPatches)
            and patches.grid_size is not None and is_plain(patches.norm, nn.Identity)):
        return None
    zeros = patches.proj.weight.new_zeros(1, *patches.grid_size, patches.proj.out_channels)
    if not model.dynamic_img_size:
        zeros = zeros.flatten(1, 2)
    return nn.Parameter(model._pos_embed(zeros), requires_grad=False)


def _add_attention(kind: type[nn.Module], low_rank: dict[str, type[LowRankAttention]],
                   tier: TierOf) -> None:
    add_attention(kind, AttentionFamily(_attention_parts, low_rank, tier, _plain_attention))


_add_attention(Attention, {"A": LowRankAttention, "B": LowRankNormedAttention}, _tier)
_add_attention(AttentionRope, {"B": LowRankRotaryAttention}, _rotary_tier)
_add_attention(EvaAttention, {"A": LowRankEvaAttention, "B": LowRankRotaryAttention}, _eva_tier)
_add_attention(BeitAttention, {"A": LowRankBeitAttention}, _tier)
_add_attention(WindowAttention, {"A": LowRankWindowAttention}, _tier)
_add_attention(CosineAttention, {"B": LowRankCosineAttention}, _rotary_tier)
add_position_network("cpb_mlp")  # of Swin v2
add_mlp(Mlp, _mlp_parts)
add_block(Block, _block_parts)
add_encoder(VisionTransformer, _encoder_parts)
add_patch_projection(PatchEmbed, "proj")
