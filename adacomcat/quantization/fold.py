"""Exact changes of a plain model before its weights are rounded: the same function, other numbers.

``optimize`` folds the affine part of a layer norm and the bias of the values into weights, too. It
must find nothing left to fold, since that would move weights off their grid.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from adacomcat.layers.fused import is_layer_norm, is_trivial
from adacomcat.layers.plain import is_plain_linear
from adacomcat.layers.registry import (
    Residual,
    attention_parts,
    attention_tier,
    block_parts,
    mlp_parts,
)
from adacomcat.layers.stock import LinearPair, PlainAttention


def fold_norms_(model: nn.Module) -> None:
    """weight = 1 and bias = 0 for the layer norms of known blocks: projections take them over."""
    for module in model.modules():
        block = block_parts(module)
        if block is not None:
            _fold_norm_(block.attn)
            _fold_norm_(block.mlp)


class _Reader(NamedTuple):
    """A layer that reads a norm's output, and the one whose bias takes what the norm adds."""

    layer: nn.Linear
    receiver: nn.Linear | None  # the layer itself, or one behind it; None where nobody needs to


def _fold_norm_(part: Residual) -> None:
    readers = _readers(part.inner)
    if not readers or not is_layer_norm(part.norm) or is_trivial(part.norm):
        return
    norm = cast(nn.LayerNorm, part.norm)
    if not all(is_plain_linear(reader.layer) for reader in readers):
        return
    if norm.bias is not None and norm.bias.any():
        if any(r.receiver is not None and r.receiver.bias is None for r in readers):
            return
        for reader in readers:
            _add_shift_(reader, norm.bias)
        norm.bias.zero_()
    for reader in readers:
        reader.layer.weight.mul_(norm.weight)
    norm.weight.fill_(1)


def _add_shift_(reader: _Reader, bias: Tensor) -> None:
    layer, receiver = reader
    if receiver is None:
        return
    shift = layer.weight.double() @ bias.double()
    if receiver is not layer:
        shift = receiver.weight.double() @ shift
    receiver.bias.add_(shift.to(receiver.bias.dtype))


def _readers(inner: nn.Module) -> list[_Reader]:
    """All layers that read what enters ``inner``; none where that is not known."""
    if isinstance(inner, PlainAttention):
        v, out = cast(nn.Linear, inner.v), cast(nn.Linear, inner.proj)
        k = _reader(inner.k)
        if inner.made_from.folds_scores:  # what all keys have in common cancels in the softmax
            k = k._replace(receiver=None)
        return [_reader(inner.q), k, _Reader(v, out)]
    if attention_tier(inner) is not None:
        parts = attention_parts(inner)
        layers = dict.fromkeys((parts.q.origin, parts.k.origin, parts.v.origin))
        return [_reader(cast(nn.Linear, layer)) for layer in layers]
    mlp = mlp_parts(inner)
    return [_reader(mlp.fc1)] if mlp is not None and mlp.plain else []


def _reader(layer: nn.Module) -> _Reader:
    if isinstance(layer, LinearPair):
        return _Reader(cast(nn.Linear, layer[0]), cast(nn.Linear, layer[1]))
    return _Reader(cast(nn.Linear, layer), cast(nn.Linear, layer))


def folding_attentions(model: nn.Module) -> list[nn.Module]:
    """The attentions whose values reach the output projection through the softmax alone."""
    return [module for module in model.modules()
            if isinstance(module, PlainAttention) or attention_tier(module, model) is not None]


def move_value_bias_(attn: nn.Module) -> None:
    """b_v = 0 and b_o + W_o b_v: the rows of a softmax sum to one."""
    if isinstance(attn, PlainAttention):
        return  # it has none
    parts = attention_parts(attn)
    if parts.v.bias is not None and parts.out.bias is not None:
        shift = parts.out.weight.double() @ parts.v.bias.double()
        parts.out.bias.add_(shift.to(parts.out.bias.dtype))
        parts.v.bias.zero_()


def rotate_middles_(model: nn.Module) -> None:
    """U R and V R with an orthogonal R, in low-rank pairs and in the values of low-rank heads.

    A decomposition sorts the middle by size; R spreads what the first columns hold over all, so
    that rounding loses less. Heads of a dense attention are not sorted, and lose nothing less.
    """
    for module in model.modules():
        if isinstance(module, LinearPair):
            first, second = (cast(nn.Linear, layer) for layer in module)
            _rotate_(first.weight, second.weight, 1)
        elif isinstance(module, PlainAttention):
            v, out = cast(nn.Linear, module.v), cast(nn.Linear, module.proj)
            _rotate_(v.weight, out.weight, module.num_heads)


def _rotate_(rows: Tensor, columns: Tensor, heads: int) -> None:
    """``rows`` (H·r, d) and ``columns`` (out, H·r), in place."""
    rotation = orthogonal(len(rows) // heads).to(rows.device)
    turned = rotation @ rows.double().unflatten(0, (heads, -1))
    rows.copy_(turned.flatten(0, 1))
    columns.copy_((columns.double().unflatten(1, (heads, -1)) @ rotation.T).flatten(1))


def orthogonal(size: int) -> Tensor:
    """A rotation (size, size) without large entries: Hadamard's times a cosine transform.

    The Hadamard matrix has the largest power of two that divides ``size``.
    """
    odd, hadamard = size, torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        odd //= 2
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1),
                              torch.cat([hadamard, -hadamard], 1)]) / 2 ** 0.5
    index = torch.arange(odd, dtype=torch.float64)
    cosine = torch.cos(torch.pi / odd * (index[:, None] * (index + 0.5))) * (2 / odd) ** 0.5
    cosine[0] /= 2 ** 0.5
    return torch.kron(hadamard, cosine)
