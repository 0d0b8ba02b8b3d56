"""A trained model → a copy for inference on the fused kernels, after everything else is decided.

``layers/fused.py`` has the modules that take the place of sublayers; here is decided which do.
"""

from collections.abc import Callable, Mapping

from torch import nn

from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.fused import (
    FusedAttention,
    FusedBlock,
    FusedDenseMlp,
    FusedMlp,
    FusedPatches,
    Sublayer,
    gains_from_op,
    is_layer_norm,
    is_trivial,
)
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import LowRankMlp, activation_name
from adacomcat.layers.packed import PackedModule
from adacomcat.layers.plain import altered_inside, is_plain, is_plain_linear
from adacomcat.layers.quantized import Int4Linear, Int8Linear, QuantizedLinear
from adacomcat.layers.registry import (
    BlockParts,
    MlpParts,
    Residual,
    attention_family,
    block_parts,
    encoder_parts,
    mlp_parts,
    patch_projection,
    tell_holders,
)
from adacomcat.layers.stock import LinearPair, PlainAttention
from adacomcat.moved import forward
from adacomcat.utils.memory import return_freed_memory
from adacomcat.utils.model import copied, replace_, unwrapped


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
    _unpack_int4_(optimized)
    encoder = encoder_parts(optimized)
    class_token_only = None if encoder is None else encoder.class_token_only
    last = encoder.blocks[-1] if encoder and class_token_only and len(encoder.blocks) else None
    for name, module in list(optimized.named_modules()):
        block, proj = block_parts(module), patch_projection(module)
        if block is not None:
            fused = fused_block(block)
            replace_(optimized, name, fused)
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


def _unpack_int4_(model: nn.Module) -> None:
    """Put float layers in the place of 4-bit ones, which no kernel multiplies by."""
    dtype = next(model.parameters()).dtype
    for name, module in list(model.named_modules()):
        if type(module) is Int4Linear:
            replace_(model, name, module.to_linear(dtype))


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
    if not is_layer_norm(part.norm) or altered_inside(part.inner):
        return Sublayer(part)
    if part.fuse:
        return part.fuse(part)
    return FusedAttention(part) if _takes_attention(part) else Sublayer(part)


def _takes_attention(part: Residual) -> bool:
    """Whether the op computes an attention, low-rank or dense, float or int8."""
    attn = part.inner
    if isinstance(attn, LowRankAttention):
        return _takes_masks_alone(type(attn))
    if type(attn) is PlainAttention:
        return attn.made_from is LowRankAttention and _takes_numbers(
            part.norm, attn.q, attn.k, attn.v, attn.proj)
    family = attention_family(attn)
    if family is None or not _takes_masks_alone(family.low_rank.get("A", nn.Module)):
        return False
    if family.tier(attn, None) != "A":
        return False
    parts = family.read(attn)
    layers = [p.origin for p in (parts.q, parts.k, parts.v, parts.out)]
    known = family.reads(attn) or all(type(layer) is Int8Linear for layer in layers)
    return known and gains_from_op(parts.q.weight) and _takes_numbers(part.norm, *layers)


def _takes_masks_alone(low_rank: type[nn.Module]) -> bool:
    return vars(low_rank).get("only_masks", False)


def _takes_numbers(norm: nn.Module, *layers: nn.Module | None) -> bool:
    """Whether an op multiplies by the weights of all ``layers``: plain floats, or int8 on a CPU
    behind a norm that has nothing to fold into them."""
    parts = [part for layer in layers if layer is not None for part in layer.modules()]
    linears = [part for part in parts if isinstance(part, nn.Linear | QuantizedLinear)]
    return all(map(is_plain_linear, linears)) or (is_trivial(norm) and all(
        type(linear) is Int8Linear and linear.weight.is_cpu for linear in linears))


# What makes an op of an MLP, by the class of both its projections.
_MLPS: Mapping[type, Callable[[Residual, MlpParts], nn.Module]] = {
    nn.Linear: FusedDenseMlp, Int8Linear: FusedDenseMlp,
    LowRankLinear: FusedMlp, LinearPair: FusedMlp}


def fused_mlp(block: BlockParts) -> nn.Module:
    """x + scale(mlp(norm(x))), as one op where there is one."""
    part = block.mlp
    if not is_layer_norm(part.norm) or altered_inside(part.inner):
        return Sublayer(part)
    if part.fuse:
        return part.fuse(part)
    mlp = part.inner.parts if type(part.inner) is LowRankMlp else mlp_parts(part.inner)
    if mlp is None or type(mlp.fc1) is not type(mlp.fc2) or not mlp.plain:
        return Sublayer(part)
    fits = activation_name(mlp.act) is not None and _takes_numbers(part.norm, mlp.fc1, mlp.fc2)
    return _MLPS.get(type(mlp.fc1), _unfused)(part, mlp) if fits else Sublayer(part)


def _unfused(part: Residual, mlp: MlpParts) -> nn.Module:
    return Sublayer(part)


def _takes_patches(proj: nn.Module) -> bool:
    return (isinstance(proj, nn.Conv2d) and is_plain(proj, nn.Conv2d)
            and proj.stride == proj.kernel_size and proj.groups == 1
            and proj.padding in ((0, 0), "valid") and proj.dilation == (1, 1))


def _ends_fused(blocks: nn.Sequential | nn.ModuleList) -> bool:
    return (len(blocks) > 0 and type(blocks[-1]) is FusedBlock
            and type(blocks[-1].attn) is FusedAttention)


# Names that left this module; their old place works for one more release.
__getattr__ = forward(__name__, ("layers.fused", "layers.folding"))
