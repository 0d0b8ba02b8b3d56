"""Plain forms of the drop-ins for timm's attentions, and what both forms have in common.

The forward methods have the arguments of timm's attentions.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as CosineAttention
from torch import Tensor, nn

from adacomcat.layers.stock import PlainAttention, causal_mask


def gathered(table: Tensor, index: Tensor) -> Tensor:
    """(positions, H) by (area, area) → (1, H, area, area)."""
    area, other = index.shape[0], index.shape[1]
    return table[index.view(-1)].view(area, other, -1).permute(2, 0, 1).unsqueeze(0)


def position_bias(attn: Any) -> Tensor | None:
    """(1, H, N, N) of a dense attention with relative positions, or of a drop-in for it."""
    table = attn.relative_position_bias_table
    return None if table is None else gathered(table, attn.relative_position_index)


def window_mask(x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """The bias of every window, plus the shift's mask (windows, area, area)."""
    if mask is None:
        return bias
    return (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)


def rotated(x: Tensor, rope: Tensor, prefix_tokens: int, half: bool) -> Tensor:
    """The rotary embedding of x (B, H, N, r), behind the prefix tokens."""
    patches = apply_rot_embed_cat(x[:, :, prefix_tokens:], rope, half=half)
    return torch.cat([x[:, :, :prefix_tokens], patches], dim=2).type_as(x)


def cosine_queries(q: Tensor, logit_scale: Tensor) -> Tensor:
    """Swin v2: queries of length exp(logit_scale), at most 100; q (B, H, N, r)."""
    return F.normalize(q, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp()


def continuous_bias(table: Tensor, index: Tensor) -> Tensor:
    """Swin v2: the bias of all pairs in a window, from its network's output (…, H)."""
    return 16 * torch.sigmoid(gathered(table.view(-1, table.shape[-1]), index))


class SwinWindow:
    """What timm's ``set_input_size`` asks of an attention in windows, by timm's own methods.

    Low-rank attentions keep the names of all that these read and write.
    """

    AREA = ("window_size", "window_area")
    set_window_size = WindowAttention.set_window_size


class BeitWindow:
    """The same for BEiT."""

    AREA = ("window_size", "num_relative_distance")
    k_bias = None
    set_window_size = getattr(BeitAttention, "set_window_size", None)  # timm 1.0.26 has none
    _init_buffers = getattr(BeitAttention, "_init_buffers", None)


class CosineWindow:
    """The same for Swin v2."""

    AREA = ("window_size", "pretrained_window_size")
    set_window_size = CosineAttention.set_window_size
    _make_pair_wise_relative_positions = CosineAttention._make_pair_wise_relative_positions


class PlainWindowAttention(SwinWindow, PlainAttention):
    """Swin."""

    if TYPE_CHECKING:
        relative_position_bias_table: Tensor
        relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = gathered(self.relative_position_bias_table, self.relative_position_index)
        return self.attend(x, self.heads(self.q(x)), self.heads(self.k(x)),
                           window_mask(x, bias, mask))


class PlainBeitAttention(BeitWindow, PlainAttention):
    """BEiT."""

    if TYPE_CHECKING:
        relative_position_bias_table: Tensor
        relative_position_index: Tensor

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = gathered(self.relative_position_bias_table, self.relative_position_index)
            bias = own if bias is None else own + bias
        return self.attend(x, self.heads(self.q(x)), self.heads(self.k(x)), bias)


class PlainEvaAttention(PlainAttention):
    """EVA without rotary embedding."""

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        mask = causal_mask(attn_mask, x, is_causal)
        return self.attend(x, self.heads(self.q(x)), self.heads(self.k(x)), mask)


class PlainRotaryAttention(PlainAttention):
    """Norms and a rotary embedding behind q and k."""

    if TYPE_CHECKING:
        q_norm: nn.Module
        k_norm: nn.Module
        num_prefix_tokens: int
        rotate_half: bool

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        q, k = self.q_norm(self.heads(self.q(x))), self.k_norm(self.heads(self.k(x)))
        if rope is not None:
            q = rotated(q, rope, self.num_prefix_tokens, self.rotate_half)
            k = rotated(k, rope, self.num_prefix_tokens, self.rotate_half)
        return self.attend(x, q, k, causal_mask(attn_mask, x, is_causal))


class PlainNormedAttention(PlainAttention):
    """Norms behind q and k, with timm's ``Attention`` signature."""

    if TYPE_CHECKING:
        q_norm: nn.Module
        k_norm: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        q, k = self.q_norm(self.heads(self.q(x))), self.k_norm(self.heads(self.k(x)))
        return self.attend(x, q, k, causal_mask(attn_mask, x, is_causal))


class PlainCosineAttention(CosineWindow, PlainAttention):
    """Swin v2."""

    if TYPE_CHECKING:
        logit_scale: Tensor
        cpb_mlp: nn.Module
        relative_coords_table: Tensor
        relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = cosine_queries(self.heads(self.q(x)), self.logit_scale)
        k = F.normalize(self.heads(self.k(x)), dim=-1)
        bias = continuous_bias(self.cpb_mlp(self.relative_coords_table),
                               self.relative_position_index)
        return self.attend(x, q, k, window_mask(x, bias, mask))
