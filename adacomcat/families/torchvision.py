"""torchvision: its Vision Transformer's blocks, MLPs, and the shifted windows of Swin."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock, VisionTransformer
from torchvision.ops.misc import MLP

from adacomcat.families.torch import self_attention, sequential_mlp
from adacomcat.layers.attention import Context, LowRankAttention
from adacomcat.layers.named_block import NamedBlock
from adacomcat.layers.plain import is_plain_linear
from adacomcat.layers.registry import (
    AttentionFamily,
    AttentionParts,
    BlockParts,
    Projection,
    Residual,
    Tier,
    add_attention,
    add_block,
    add_mlp,
    add_patch_projection,
)
from adacomcat.layers.stock import PlainAttention

FAR = -100.0  # what the logit of a pair from different regions gets


class _ShiftedWindows:
    """Images (B, H, W, C) in shifted windows, and back."""

    num_heads: int
    window_size: list[int]
    shift_size: list[int]
    relative_position_bias_table: Tensor  # (positions, H)
    relative_position_index: Tensor  # (area * area,)

    def windows(self, image: Tensor) -> Tensor:
        """(B · windows, area, C)"""
        (height, width), (rows, columns) = self._padded(image), self.window_size
        x = F.pad(image, (0, 0, 0, width - image.shape[2], 0, height - image.shape[1]))
        x = torch.roll(x, [-step for step in self._shift(height, width)], dims=(1, 2))
        x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
        return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)

    def image(self, windows: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``windows``; ``like``: what was given to it."""
        (height, width), (rows, columns) = self._padded(like), self.window_size
        x = windows.unflatten(1, (rows, columns))
        x = x.unflatten(0, (like.shape[0], height // rows, width // columns))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = torch.roll(x, self._shift(height, width), dims=(1, 2))
        return x[:, :like.shape[1], :like.shape[2]].contiguous()

    def bias(self, image: Tensor) -> Tensor:
        """What is added to the logits: (1 or B · windows, H, area, area)."""
        rows, columns = self.window_size
        area = rows * columns
        table = self.relative_position_bias_table[self.relative_position_index]
        bias = table.view(area, area, -1).permute(2, 0, 1).unsqueeze(0)
        height, width = self._padded(image)
        shift = self._shift(height, width)
        if not any(shift):
            return bias
        regions = [self._regions(size, window, step, image.device)
                   for size, window, step in zip((height, width), self.window_size, shift,
                                                 strict=True)]
        region = (3 * regions[0].unsqueeze(1) + regions[1]).unflatten(1, (-1, columns))
        region = region.unflatten(0, (-1, rows)).transpose(1, 2).flatten(0, 1).flatten(1)
        apart = (region.unsqueeze(1) != region.unsqueeze(2)).to(bias.dtype) * FAR
        return (bias + apart.unsqueeze(1)).repeat(image.shape[0], 1, 1, 1)

    def _padded(self, image: Tensor) -> tuple[int, int]:
        rows, columns = self.window_size
        return -(-image.shape[1] // rows) * rows, -(-image.shape[2] // columns) * columns

    def _shift(self, height: int, width: int) -> list[int]:
        """Along a side that one window covers nothing is shifted."""
        return [0 if window >= size else step for step, window, size in zip(
            self.shift_size, self.window_size, (height, width), strict=True)]

    @staticmethod
    def _regions(size: int, window: int, step: int, device: torch.device) -> Tensor:
        """(size,): 0 inside; 1 and 2 on either side of the seam in the last window."""
        place = torch.arange(size, device=device)
        return (place >= size - window).long() + (place >= size - step).long()


class PlainShiftedWindowAttention(_ShiftedWindows, PlainAttention):
    """The same in PyTorch's own modules."""

    def forward(self, x: Tensor) -> Tensor:
        windows = self.windows(x)
        q, k = self.heads(self.q(windows)), self.heads(self.k(windows))
        return self.image(self.attend(windows, q, k, self.bias(x)), x)


class LowRankShiftedWindowAttention(_ShiftedWindows, LowRankAttention):
    """Tier A: images (B, H, W, C) → the same, with a relative position bias in each window."""

    plain = PlainShiftedWindowAttention

    def adopt(self, attn: Any) -> None:
        self.window_size, self.shift_size = list(attn.window_size), list(attn.shift_size)
        self.relative_position_bias_table = nn.Parameter(
            attn.relative_position_bias_table.detach().clone())
        self.register_buffer("relative_position_index", attn.relative_position_index.clone())

    def attended(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Context] | None:
        return self.windows(x), self.score_context(x)

    def score_context(self, x: Tensor, *args: Any, **kwargs: Any) -> Context:
        return self.bias(x), None

    def forward(self, x: Tensor) -> Tensor:
        return self.image(self.attend(self.windows(x), self.bias(x)), x)


def _window_parts(attn: Any) -> AttentionParts:
    whole = Projection.of(attn.qkv)
    biases = [None] * 3 if whole.bias is None else whole.bias.chunk(3)
    q, k, v = (whole._replace(weight=weight, bias=bias)
               for weight, bias in zip(whole.weight.chunk(3), biases, strict=True))
    head_dim = whole.weight.shape[1] // attn.num_heads
    return AttentionParts(q, k, v, Projection.of(attn.proj), attn.num_heads, head_dim ** -0.5,
                          attn.attention_dropout, attn.dropout)


def _window_plain(attn: Any) -> bool:
    return is_plain_linear(attn.qkv) and is_plain_linear(attn.proj)


def _whole(attn: nn.Module, model: nn.Module | None) -> Tier | None:
    return "A"


def _block_parts(block: Any) -> BlockParts | None:
    attn, mlp = block.self_attention, block.mlp
    return BlockParts(
        Residual("self_attention", block.ln_1, attn, block.dropout, None, self_attention),
        Residual("mlp", block.ln_2, mlp, nn.Identity(), None),
        partial(NamedBlock, attention="self_attention"))


add_attention(ShiftedWindowAttention, AttentionFamily(
    _window_parts, {"A": LowRankShiftedWindowAttention}, _whole, _window_plain))
add_mlp(MLP, sequential_mlp)
add_mlp(MLPBlock, sequential_mlp)
add_block(EncoderBlock, _block_parts)
add_patch_projection(VisionTransformer, "conv_proj")
