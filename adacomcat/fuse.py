"""Whole sublayers on the fused kernels: for inference, after everything else is decided.

x + ls · f(norm(x)) becomes one op: the weight and bias of the layer norm and the layer scale are
folded into the projections, exactly, and the residual is added as the last of it.
"""

import copy

from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.fused import (
    FirstTokenVisionTransformer,
    FusedAttention,
    FusedDenseMlp,
    FusedMlp,
    FusedPatches,
    Sublayer,
    _affine,
    _embedding,
    meet_few_rows_,
)
from adacomcat.layers.mlp import LowRankMlp, activation_name
from adacomcat.moved import forward
from adacomcat.sites import attention_tier


class FusedBlock(nn.Module):
    """A timm ``Block`` in eval mode; its signature."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.attn, self.mlp = sublayer(block, "attn"), sublayer(block, "mlp")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        return self.mlp(self.attn(x, attn_mask=attn_mask, is_causal=is_causal))


def optimize(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, its blocks on the fused path; same outputs.

    Low-rank and dense sublayers alike; blocks that are not timm's ``Block`` stay as they are. Where
    the head reads the class token only, the last block computes only that. Save and train the model
    that went in, not this one: norms are folded into weights here.
    """
    optimized = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in list(optimized.named_modules()):
        if type(module) is Block:
            optimized.set_submodule(name, FusedBlock(module).eval())
        elif type(module) is PatchEmbed and _takes_patches(module.proj):
            module.proj.__class__ = FusedPatches  # what asks it for its channels finds them
    if _head_reads_first_token(optimized):
        optimized.__class__ = FirstTokenVisionTransformer  # its parts, names and API stay
        optimized.embedding = _embedding(optimized)
        meet_few_rows_(optimized.head)
    return optimized


def sublayer(block: Block, part: str) -> nn.Module:
    """What runs in the place of 'attn' or 'mlp' with its norm, scale and residual."""
    if part == "attn":
        return _attention_class(block)(block.norm1, block.attn, block.ls1)
    return _mlp_class(block)(block.norm2, block.mlp, block.ls2)


def _attention_class(block: Block) -> type[nn.Module]:
    attn = block.attn
    # Elsewhere than on a CPU one library product for q, k and v serves a dense attention better.
    fits = type(attn) is LowRankAttention or (
        type(attn) is Attention and attention_tier(attn) == "A"
        and type(attn.qkv) is type(attn.proj) is nn.Linear and attn.qkv.weight.is_cpu)
    return FusedAttention if fits and _affine(block.norm1) is not None else Sublayer


def _mlp_class(block: Block) -> type[nn.Module]:
    mlp = block.mlp
    if _affine(block.norm2) is None or type(mlp) not in (Mlp, LowRankMlp):
        return Sublayer
    if activation_name(mlp.act) is None:
        return Sublayer
    if type(mlp) is LowRankMlp:
        return FusedMlp
    dense = type(mlp.fc1) is type(mlp.fc2) is nn.Linear and type(mlp.norm) is nn.Identity
    return FusedDenseMlp if dense else Sublayer


def _takes_patches(proj: nn.Module) -> bool:
    return (type(proj) is nn.Conv2d and proj.stride == proj.kernel_size and proj.groups == 1
            and proj.padding == (0, 0) and proj.dilation == (1, 1))


def _head_reads_first_token(model: nn.Module) -> bool:
    return (type(model) is VisionTransformer and model.global_pool == "token"
            and model.attn_pool is None and len(model.blocks) > 0
            and type(model.blocks[-1]) is FusedBlock
            and type(model.blocks[-1].attn) is FusedAttention)


# Names that left this module in 0.2.
__getattr__ = forward(__name__, ("layers.fused",))
