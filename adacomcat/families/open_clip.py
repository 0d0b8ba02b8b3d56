"""open_clip: the residual blocks of its towers. Their attentions and MLPs are PyTorch's own."""

from functools import partial
from typing import Any

import torch
from open_clip.transformer import (
    LayerNorm,
    LayerScale,
    QuickGELU,
    ResidualAttentionBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.families.torch import self_attention
from adacomcat.layers.fused import FusedBlock, add_layer_norm
from adacomcat.layers.mlp import add_activation
from adacomcat.layers.plain import is_plain
from adacomcat.layers.registry import BlockParts, Residual, add_block, add_patch_projection


class FusedResidualBlock(FusedBlock):
    """A block in eval mode, with the arguments of open_clip's."""

    def __init__(self, attn: nn.Module, mlp: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(attn, mlp)
        self.weight_dtype = dtype

    def get_weight_dtype(self) -> torch.dtype:
        """What the text tower casts its tokens to."""
        return self.weight_dtype

    def forward(self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None,
                attn_mask: Tensor | None = None) -> Tensor:
        if not (k_x is None and v_x is None):
            raise UserError("an optimized block of open_clip attends to its own tokens only; call "
                            "the model that adacomcat.optimize was given")
        mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
        return self.mlp(self.attn(q_x, attn_mask=mask))


def _block_parts(block: Any) -> BlockParts | None:
    scales = (block.ls_1, block.ls_2)
    plain = all(is_plain(scale, LayerScale, nn.Identity) for scale in scales)
    if not plain or hasattr(block, "ln_1_kv") or not block.attn.batch_first:
        return None
    gammas = [None if isinstance(scale, nn.Identity) else scale.gamma.detach() for scale in scales]
    return BlockParts(
        Residual("attn", block.ln_1, block.attn, block.ls_1, gammas[0], self_attention),
        Residual("mlp", block.ln_2, block.mlp, block.ls_2, gammas[1]),
        partial(FusedResidualBlock, dtype=block.ln_1.weight.dtype))


add_activation(QuickGELU, "quick_gelu")
add_layer_norm(LayerNorm)
add_block(ResidualAttentionBlock, _block_parts)
add_patch_projection(VisionTransformer, "conv1")
