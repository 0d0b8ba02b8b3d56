"""A trained model → a copy for inference on the fused kernels, after everything else is decided.

``layers/fused.py`` has the modules that take the place of sublayers; here is decided which do.
"""

from dataclasses import replace
from typing import cast

from torch import nn

from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.fused import (
    FusedAttention,
    FusedBlock,
    FusedDenseMlp,
    FusedMlp,
    FusedPatches,
    Sublayer,
    fuses_dense,
    is_layer_norm,
    is_trivial,
)
from adacomcat.layers.int8 import Int8Linear
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import LowRankMlp, activation_name
from adacomcat.layers.packed import PackedModule
from adacomcat.layers.plain import altered_inside, is_plain
from adacomcat.layers.registry import (
    BlockParts,
    MlpParts,
    Residual,
    attention_family,
    attention_tier,
    block_parts,
    encoder_parts,
    mlp_parts,
    patch_projection,
    tell_holders,
)
from adacomcat.layers.stock import LinearPair, PlainAttention
from adacomcat.moved import forward
from adacomcat.utils.memory import return_freed_memory
from adacomcat.utils.model import copied, unwrapped


def optimize(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, its blocks on the fused path; same outputs.

    Low-rank and dense sublayers alike. Blocks of classes that no family knows stay as they are, and
    so do layers with adapters, masks, hooks or parametrizations.
    Where the head reads the class token only, the last block computes only that token. Save and
    train the model that went in, not this one: norms are folded into weights here.

    Where a CPU kernel runs, a fused sublayer holds its weights in the kernel's packed form alone.
    They are read back for ``state_dict``, ``copy.deepcopy``, ``to`` and by their names. Writes
    to what was read back change nothing; assign a parameter or load a ``state_dict``.

    Args:
        model: A dense or a compressed model. It is left as it is.

    Returns:
        The copy, in eval mode, without gradients. Modules keep their names, and the model keeps
        the methods of its class (``forward_features``, ``forward_head``, ``set_input_size`` …).
    """
    optimized = copied(unwrapped(model), views=True).eval().requires_grad_(False)
    encoder = encoder_parts(optimized)
    class_token_only = None if encoder is None else encoder.class_token_only
    last = encoder.blocks[-1] if encoder and class_token_only and len(encoder.blocks) else None
    for name, module in list(optimized.named_modules()):
        block, proj = block_parts(module), patch_projection(module)
        if block is not None:
            fused = fused_block(block)
            optimized.set_submodule(name, fused)
            if module is not last:  # that one multiplies single tokens, by weights as they are
                _pack_(fused)
            elif isinstance(mlp := fused.mlp, PackedModule) and mlp.is_int8:  # but not of int8
                mlp.pack_()
        elif proj is not None and _takes_patches(conv := getattr(module, proj)):
            setattr(module, proj, FusedPatches(conv))
    if encoder and class_token_only and _ends_fused(encoder.blocks):
        optimized = class_token_only()
    else:
        _pack_(optimized)
    _take_weights_(optimized, model)
    tell_holders(optimized, {})
    return_freed_memory()
    return optimized


def _pack_(module: nn.Module) -> None:
    """Pack the weights of fused sublayers, where a CPU kernel takes them."""
    for part in module.modules():
        if isinstance(part, PackedModule):
            part.pack_()


def _take_weights_(optimized: nn.Module, model: nn.Module) -> None:
    """Copy what ``optimized`` still has in the memory of ``model``."""
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for parameter in optimized.parameters():
        if parameter.untyped_storage().data_ptr() in theirs:
            parameter.data = parameter.data.clone()


def fused_block(block: BlockParts) -> nn.Module:
    """What runs in the place of a block."""
    return (block.build or FusedBlock)(fused_attention(block), fused_mlp(block)).eval()


def sublayer(block: nn.Module, name: str) -> nn.Module:
    """What runs in the place of a block's 'attn' or 'mlp' with its norm, scale and residual."""
    parts = block_parts(block)
    assert parts is not None, "only known blocks are fused"
    return fused_attention(parts) if name == parts.attn.name else fused_mlp(parts)


def fused_attention(block: BlockParts) -> nn.Module:
    """x + scale(attn(norm(x))), as one op where there is one."""
    part = block.attn
    if part.fuse and is_layer_norm(part.norm) and not altered_inside(part.inner):
        return part.fuse(part)
    fits = is_layer_norm(part.norm) and (
        _is_whole_attention(part.inner) or _fuses_dense(part.inner)
        or (_fuses_int8_attention(part.inner) and is_trivial(part.norm)))
    return FusedAttention(part) if fits else Sublayer(part)


def _fuses_int8_attention(attn: nn.Module) -> bool:
    """Whether ``attn`` is quantised as a whole, and the op computes it."""
    if altered_inside(attn):
        return False
    if type(attn) is PlainAttention:
        return (attn.made_from is LowRankAttention
                and _are_int8(attn.q, attn.k, attn.v, attn.proj))
    family = attention_family(attn)
    if family is None or family.low_rank.get("A") is not LowRankAttention:
        return False
    if family.tier(attn, None) != "A":
        return False
    parts = family.read(attn)
    return _are_int8(parts.q.origin, parts.k.origin, parts.v.origin, parts.out.origin)


def _are_int8(*layers: nn.Module | None) -> bool:
    """Whether the layers are int8 and on a CPU, where the ops multiply int8."""
    return all(type(layer) is Int8Linear and layer.weight.is_cpu for layer in layers)


def _is_whole(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is a drop-in of this class whose factors are all that decides."""
    return type(module) is kind and not altered_inside(module)


def _is_whole_attention(attn: nn.Module) -> bool:
    return (isinstance(attn, LowRankAttention) and _takes_masks_alone(type(attn))
            and not altered_inside(attn))


def _takes_masks_alone(low_rank: type[nn.Module]) -> bool:
    return vars(low_rank).get("only_masks", False)


def _fuses_dense(attn: nn.Module) -> bool:
    """Whether this is a dense attention of tier A that takes masks alone, and the op is faster."""
    family = attention_family(attn)
    return (family is not None and _takes_masks_alone(family.low_rank.get("A", nn.Module))
            and attention_tier(attn) == "A" and fuses_dense(attn))


def fused_mlp(block: BlockParts) -> nn.Module:
    """x + scale(mlp(norm(x))), as one op where there is one."""
    part = block.mlp
    mlp = part.inner
    if not is_layer_norm(part.norm):
        return Sublayer(part)
    if part.fuse and not altered_inside(mlp):
        return part.fuse(part)
    if type(mlp) is LowRankMlp:
        whole = (_is_whole(mlp, LowRankMlp) and type(mlp.fc1) is type(mlp.fc2) is LowRankLinear
                 and activation_name(mlp.act) is not None)
        return FusedMlp(part) if whole else Sublayer(part)
    parts = mlp_parts(mlp)
    if parts is None or not parts.plain or activation_name(parts.act) is None:
        return Sublayer(part)
    if parts.dense:
        return FusedDenseMlp(part, parts)
    if _is_whole(parts.fc1, LowRankLinear) and _is_whole(parts.fc2, LowRankLinear):
        whole = LowRankMlp(cast(LowRankLinear, parts.fc1), parts.act,
                           cast(LowRankLinear, parts.fc2), parts.drop)
        return FusedMlp(replace(part, inner=whole))
    return _fused_int8_mlp(part, parts)


def _fused_int8_mlp(part: Residual, mlp: MlpParts) -> nn.Module:
    if not is_trivial(part.norm) or altered_inside(part.inner):
        return Sublayer(part)
    fc1, fc2 = mlp.fc1, mlp.fc2
    if _are_int8(fc1, fc2):
        return FusedDenseMlp(part, mlp)
    pairs = type(fc1) is type(fc2) is LinearPair and _are_int8(*fc1.children(), *fc2.children())
    return FusedMlp(part) if pairs else Sublayer(part)


def _takes_patches(proj: nn.Module) -> bool:
    return (isinstance(proj, nn.Conv2d) and is_plain(proj, nn.Conv2d)
            and proj.stride == proj.kernel_size and proj.groups == 1
            and proj.padding in ((0, 0), "valid") and proj.dilation == (1, 1))


def _ends_fused(blocks: nn.Sequential | nn.ModuleList) -> bool:
    return (len(blocks) > 0 and type(blocks[-1]) is FusedBlock
            and type(blocks[-1].attn) is FusedAttention)


# Names that left this module; their old place works for one more release.
__getattr__ = forward(__name__, ("layers.fused", "layers.folding"))
