"""Blocks of timm with arguments or layouts of their own: EVA and DINOv3, BEiT, Swin."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath, GluMlp, SwiGLU
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.families.timm_plain import BeitWindow, SwinWindow, position_bias, window_mask
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.folding import AffineMap, is_affine
from adacomcat.layers.fused import (
    FusedAttention,
    FusedBlock,
    FusedGatedMlp,
    FusedRotaryAttention,
    fuses_dense,
    fuses_rotary,
    require_tensor,
)
from adacomcat.layers.mlp import activation_name
from adacomcat.layers.plain import is_plain
from adacomcat.layers.registry import BlockParts, Residual, add_block
from adacomcat.layers.stock import causal_mask


class Scaled(nn.Module):
    """x γ, the layer scale that these blocks hold as a parameter."""

    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def _residual(name: str, norm: nn.Module, inner: nn.Module, gamma: nn.Parameter | None,
              fuse: Callable[[Residual], nn.Module] | None = None) -> Residual:
    scale = nn.Identity() if gamma is None else Scaled(gamma)
    return Residual(name, norm, inner, scale, None if gamma is None else gamma.detach(),
                    fuse=fuse)


def fuse_gated(mlp: Any) -> Callable[[Residual], nn.Module] | None:
    """What fuses timm's gated MLPs; None for other modules."""
    if type(mlp) not in (GluMlp, SwiGLU) or activation_name(mlp.act) is None:
        return None
    drops = all(is_plain(drop, nn.Dropout, nn.Identity) for drop in (mlp.drop1, mlp.drop2))
    inputs = (mlp.fc1,) if type(mlp) is GluMlp else (mlp.fc1_g, mlp.fc1_x)
    if not (drops and is_plain(mlp.norm, nn.Identity)
            and all(map(is_affine, (*inputs, mlp.fc2)))):
        return None
    return _fused_gated


def _fused_gated(part: Residual) -> nn.Module:
    mlp = part.inner
    if type(mlp) is GluMlp:
        first, second = AffineMap.of(mlp.fc1).halves()
        gate, up = (second, first) if mlp.gate_last else (first, second)
    else:
        gate, up = AffineMap.of(mlp.fc1_g), AffineMap.of(mlp.fc1_x)
    return FusedGatedMlp(part, gate, up, AffineMap.of(mlp.fc2), mlp.act)


def _drops_nothing(block: Any) -> bool:
    return all(is_plain(drop, DropPath, nn.Identity)
               for drop in (block.drop_path1, block.drop_path2))


def _refuse_size() -> None:
    raise UserError("an optimized model keeps its windows; call set_input_size on the model that "
                    "adacomcat.optimize was given")


class FusedEvaAttention(FusedRotaryAttention):
    """The call may bring a rotary embedding: sines beside cosines, (…, P, 2 head_dim)."""

    def __init__(self, part: Residual) -> None:
        super().__init__(part, getattr(part.inner, "rotate_half", False))

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        sin, cos = (None, None) if rope is None else rope.chunk(2, -1)
        return self.attend(x, sin, cos, causal_mask(attn_mask, x, is_causal))


class FusedEvaBlock(FusedBlock):
    """Takes a rotary embedding."""

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        require_tensor(x)
        if rope is None:
            return super().forward(x, attn_mask, is_causal)
        if isinstance(self.attn, FusedAttention):
            raise UserError("this attention was fused for a model without rotary embedding")
        return self.mlp(self.attn(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal))


def _eva_parts(block: Any) -> BlockParts | None:
    if not _drops_nothing(block):
        return None
    return BlockParts(
        _residual("attn", block.norm1, block.attn, block.gamma_1, _eva_attention(block.attn)),
        _residual("mlp", block.norm2, block.mlp, block.gamma_2, fuse_gated(block.mlp)),
        FusedEvaBlock)


def _eva_attention(attn: Any) -> Callable[[Residual], nn.Module] | None:
    """What fuses it. A dense one does not know whether it is called with a rotary embedding."""
    if isinstance(attn, LowRankAttention) and attn.folds_scores:
        return FusedAttention
    normed = any(type(getattr(attn, name, None)) not in (nn.Identity, type(None))
                 for name in ("q_norm", "k_norm"))
    if normed:
        return None
    return FusedEvaAttention if fuses_rotary(attn) else None


class FusedBiasedAttention(FusedAttention):
    """With a relative position bias, gathered once: (1, H, N, N), added to the logits."""

    bias: Tensor | None

    def __init__(self, part: Residual) -> None:
        super().__init__(part)
        bias = position_bias(part.inner)  # kernels read adjacent columns faster
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous(),
                             persistent=False)

    def set_window_size(self, *args: object, **kwargs: object) -> None:
        """
        Raises:
            UserError: Always: the bias was gathered for one size.
        """
        _refuse_size()


class FusedBeitAttention(FusedBiasedAttention):
    """The call may bring a bias that all layers share."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = self.bias
        if shared_rel_pos_bias is not None:
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        return self.fused(x, self.num_heads, self.scale, bias)


class FusedBeitBlock(FusedBlock):
    """With BEiT's arguments."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self.mlp(self.attn(x, shared_rel_pos_bias=shared_rel_pos_bias))


def _fused_as(attn: nn.Module, dense: type, window: type, fused: type[FusedAttention]
              ) -> type[FusedAttention] | None:
    """``fused`` for an attention of this kind, dense or low-rank."""
    low_rank = isinstance(attn, window) and isinstance(attn, LowRankAttention)
    return fused if low_rank or (type(attn) is dense and fuses_dense(attn)) else None


def _beit_parts(block: Any) -> BlockParts | None:
    if not _drops_nothing(block):
        return None
    fuse = _fused_as(block.attn, BeitAttention, BeitWindow, FusedBeitAttention)
    return BlockParts(_residual("attn", block.norm1, block.attn, block.gamma_1, fuse),
                      _residual("mlp", block.norm2, block.mlp, block.gamma_2,
                                fuse_gated(block.mlp)), FusedBeitBlock)


class FusedWindowAttention(FusedBiasedAttention):
    """The same bias in every window, and the mask of shifted ones."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.fused(x, self.num_heads, self.scale, window_mask(x, cast(Tensor, self.bias),
                                                                     mask))


class FusedSwinBlock(FusedBlock):
    """Swin: norm, attention and residual go over windows of the tokens themselves.

    Norm and residual know single tokens only, so they may stand behind the partition. This holds
    where windows need no padding.
    """

    attn_mask: Tensor | None

    def __init__(self, attn: nn.Module, mlp: nn.Module, block: SwinTransformerBlock) -> None:
        super().__init__(attn, mlp)
        self.window_size, self.shift_size = block.window_size, block.shift_size
        self.register_buffer("attn_mask", cast(Tensor | None, block.attn_mask), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        images, height, width, d = x.shape
        if height % self.window_size[0] or width % self.window_size[1]:
            raise UserError(f"tokens of {height} x {width} do not divide into windows; call "
                            "set_input_size before optimize")
        size = (self.window_size[0], self.window_size[1])
        rows, columns = self.shift_size
        x = torch.roll(x, (-rows, -columns), (1, 2)) if rows or columns else x
        windows = self.attn(window_partition(x, size).flatten(1, 2), mask=self.attn_mask)
        x = window_reverse(windows.unflatten(1, size), size, height, width)
        x = torch.roll(x, (rows, columns), (1, 2)) if rows or columns else x
        return self.mlp(x.reshape(images, -1, d)).view(images, height, width, d)

    def set_input_size(self, *args: object, **kwargs: object) -> None:
        """
        Raises:
            UserError: Always: position biases were gathered for one size.
        """
        _refuse_size()


def _swin_parts(block: Any) -> BlockParts | None:
    divides = not any(size % window for size, window in
                      zip(block.input_resolution, block.window_size, strict=True))
    if not (divides and _drops_nothing(block)) or getattr(block, "dynamic_mask", False):
        return None
    fuse = _fused_as(block.attn, WindowAttention, SwinWindow, FusedWindowAttention)
    return BlockParts(_residual("attn", block.norm1, block.attn, None, fuse),
                      _residual("mlp", block.norm2, block.mlp, None),
                      partial(FusedSwinBlock, block=block))


add_block(EvaBlock, _eva_parts)
add_block(BeitBlock, _beit_parts)
add_block(SwinTransformerBlock, _swin_parts)
