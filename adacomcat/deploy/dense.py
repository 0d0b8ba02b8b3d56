"""U Vᵀ written back into the weights of the dense architecture."""

from typing import Any

import torch
from torch import Tensor, nn

from adacomcat.checkpoint.build import build
from adacomcat.checkpoint.folder import describe
from adacomcat.convert.plain import from_plain, is_plain_form, require_not_optimized
from adacomcat.convert.quantized import require_not_quantized
from adacomcat.errors import UserError
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.registry import attention_parts, mlp_parts
from adacomcat.utils.model import copied, unwrapped


@torch.no_grad()
def to_dense(model: nn.Module) -> nn.Module:
    """timm's dense model that computes the same as a compressed one, in eval mode.

    Factors are multiplied out, ranks per head and lost neurons filled up with zeros. It is as large
    and as slow as before compression, and needs nothing of this package.

    Args:
        model: A compressed timm model, or what ``to_plain`` made of one; it stays as it is.

    Raises:
        UserError: The model comes from ``adacomcat.optimize`` or does not know its architecture, or
            its dense architecture lacks a bias that the compressed one has.
    """
    require_not_optimized(model, "to_dense")
    require_not_quantized(model, "to_dense")
    model = unwrapped(model)
    model = from_plain(model) if is_plain_form(model) else copied(model)
    config = describe(model)
    args = dict(config["model_args"])
    args.pop("plan", None)
    base = args.pop("base", config["architecture"])
    dense = build({**config, "architecture": base, "model_args": args}, base)
    first = next(model.parameters())
    dense.to(first.device, first.dtype)
    _copy_same_(dense, model)
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear) and not _inside_attention(name, model):
            _write_linear_(dense.get_submodule(name), module)
        elif isinstance(module, LowRankAttention):
            _write_attention_(dense.get_submodule(name), module, name)
        elif mlp_parts(module) is not None:
            _write_pruned_(dense.get_submodule(name), module)
    return dense.eval().requires_grad_(False)


def _copy_same_(dense: nn.Module, model: nn.Module) -> None:
    """What has the same name and shape in both is the same."""
    weights, wanted = model.state_dict(), dense.state_dict()
    dense.load_state_dict({name: value for name, value in weights.items()
                           if name in wanted and wanted[name].shape == value.shape}, strict=False)


def _inside_attention(name: str, model: nn.Module) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), LowRankAttention)


def _write_linear_(linear: Any, low_rank: LowRankLinear) -> None:
    linear.weight.copy_(low_rank.weight)
    if low_rank.bias is not None:
        linear.bias.copy_(low_rank.bias)


def _write_pruned_(dense: nn.Module, module: nn.Module) -> None:
    """Neurons that were left out get weights of zero."""
    there, here = mlp_parts(dense), mlp_parts(module)
    if there is None or here is None or not (there.dense and here.dense):
        return
    (fc1, fc2), (kept1, kept2) = there.linears, here.linears
    width = kept1.out_features
    if width == fc1.out_features:
        return
    for target, kept in ((fc1.weight, kept1.weight), (fc1.bias, kept1.bias)):
        if kept is not None:
            target.zero_()
            target[:width] = kept
    fc2.weight.zero_()
    fc2.weight[:, :width] = kept2.weight


def _write_attention_(attn: nn.Module, low_rank: LowRankAttention, name: str) -> None:
    """Through ``attention_parts``, whose tensors are views of the dense attention's weights."""
    parts, heads = attention_parts(attn), low_rank.num_heads
    for part, rows, bias in _scores(low_rank):
        projection = getattr(parts, part)
        _place_(projection.weight, rows, heads)
        _place_bias_(projection.bias, bias, heads, f"{name}: its {part}")
    _place_(parts.v.weight, low_rank.wv, heads)
    _place_bias_(parts.v.bias, None, heads, name)
    _place_(parts.out.weight.T, low_rank.wo.T, heads)
    _place_bias_(parts.out.bias, low_rank.bo, 1, f"{name}: its output projection")


def _scores(low_rank: LowRankAttention) -> list[tuple[str, Tensor, Tensor | None]]:
    """(part, weight, bias) of queries and keys."""
    if low_rank.folds_scores:
        return [("q", low_rank.wq, low_rank.bq), ("k", low_rank.wk, None)]
    return [(part, getattr(low_rank, part).weight, getattr(low_rank, part).bias) for part in "qk"]


def _place_(target: Tensor, rows: Tensor, heads: int) -> None:
    """``rows`` (H·r, …) as the first of each head's in ``target`` (H·head_dim, …); zeros behind."""
    rows = rows.unflatten(0, (heads, -1))
    target.zero_()
    target.unflatten(0, (heads, -1))[:, :rows.shape[1]] = rows


def _place_bias_(target: Tensor | None, bias: Tensor | None, heads: int, what: str) -> None:
    if target is None:
        if bias is not None and bias.any():
            raise UserError(f"{what} has a bias now, and none in the dense architecture; export "
                            "to another format")
    elif bias is None:
        target.zero_()
    else:
        _place_(target, bias, heads)
