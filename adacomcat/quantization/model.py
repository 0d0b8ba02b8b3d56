"""``quantize``: a dense or compressed model → a copy whose projections are on few bits."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from adacomcat.convert.calibrate import (
    KeptImages,
    LinearCollector,
    calibration_batches,
    collected,
    require_taken,
)
from adacomcat.convert.factors import require_finite_model
from adacomcat.convert.plain import require_not_optimized, to_plain_
from adacomcat.convert.quantized import require_not_quantized
from adacomcat.convert.record import compression_of
from adacomcat.errors import UserError
from adacomcat.factorize.factors import LinearStatistics
from adacomcat.layers.plain import is_plain_linear
from adacomcat.layers.quantized import QUANTIZED, Int8Linear, QuantizedLinear
from adacomcat.layers.registry import (
    encoder_parts,
    example,
    is_position_network,
    tell_holders,
)
from adacomcat.quantization.fold import (
    fold_norms_,
    folding_attentions,
    move_value_bias_,
    rotate_middles_,
)
from adacomcat.quantization.rounding import round_linear
from adacomcat.utils.inputs import Inputs, call
from adacomcat.utils.limits import QUANTIZATIONS
from adacomcat.utils.model import copied, replace_, unwrapped
from adacomcat.utils.progress import progress

Groups = list[list[str]]  # names of layers, those together that read the same tensor
Found = Iterator[tuple[list[str], LinearStatistics | None]]
# Name of a module → bits of the weights inside; "" is the whole model. The longest name counts.
Bits = Mapping[str, int]
MOST_BYTES = 2**29  # of covariances at a time


@torch.no_grad()
def quantize(model: nn.Module, calibration: Tensor | Iterable | KeptImages | None = None,
             dtype: str = "int8") -> nn.Module:
    """A copy of ``model`` on int8 weights and activations, in eval mode; it does not train.

    The linear layers that work on tokens become int8: one scale for each output channel of a
    weight, one for each token of an activation, at every call. The head, embeddings, norms and
    attention's softmax stay float. Low-rank layers get their plain form (``to_plain``) first, and
    what stands between layers is folded into them. ``optimize`` puts the result on int8 kernels.

    'int4' rounds weights alone, with a scale for each 32 inputs of an output channel. It makes the
    file small; the model runs as the float model that it stands for.

    Args:
        model: A dense or a compressed model; it stays as it is. This is the last step before
            ``optimize``: nothing compresses or trains the result.
        calibration: Images (N, C, H, W) as the model sees them, an iterable of batches, or a
            ``Calibration`` that kept its images. They correct the errors of rounding. Without
            images every weight goes to the nearest of its grid.
        dtype: 'int8' or 'int4'.

    Raises:
        UserError: The model comes from ``optimize`` or ``quantize``, has no linear layer that works
            on tokens, or a weight or an image is not finite.
    """
    bits = {"": bits_of(dtype)}
    require_not_optimized(model, "quantize")
    require_not_quantized(model, "quantize")
    require_finite_model(model)
    return quantized_(copied(unwrapped(model)), calibration, bits)


def bits_of(dtype: str) -> int:
    """
    Raises:
        UserError: ``quantize`` does not know ``dtype``.
    """
    if dtype not in QUANTIZATIONS:
        raise UserError(f"quantize knows the dtype {', '.join(QUANTIZATIONS)}; got {dtype!r:.40}")
    return QUANTIZATIONS[dtype]


def quantized_(model: nn.Module, calibration: Tensor | Iterable | KeptImages | None,
               bits: Bits) -> nn.Module:
    """``quantize`` in place, for a model that is checked; layers that ``bits`` does not name stay.
    """
    own = next(model.parameters()).dtype
    made = to_plain_(model).float().eval().requires_grad_(False)
    quantized = quantize_(made, _batches(calibration, made), bits).to(own)
    tell_holders(quantized, compression_of(quantized).ranks)
    return quantized


@torch.no_grad()
def quantize_(model: nn.Module, batches: list[Inputs] | None, bits: Bits | None = None,
              rotate: bool = True) -> nn.Module:
    """``quantized_`` for a plain model in float32; rotate: also the middles of factors."""
    chosen = {"": 8} if bits is None else bits
    groups = token_layers(model, batches)
    fold_norms_(model)
    attentions = folding_attentions(model)
    for attn in attentions:
        move_value_bias_(attn)
    if rotate:
        rotate_middles_(model)
    made = list(rounded(model, groups, batches, lambda name: _chosen(name, chosen)))
    for name, layer in made:
        replace_(model, name, layer)
    for attn in attentions:  # what rounding gave the values
        move_value_bias_(attn)
    return model


def int8_form_(module: nn.Module) -> None:
    """In place: the shapes that ``quantize`` gives what is inside, whose linear layers all work on
    tokens. Numbers are arbitrary."""
    to_plain_(module)
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif is_plain_linear(part) and not any(map(is_position_network, name.split("."))):
            replace_(module, name, Int8Linear.like(cast(nn.Linear, part)))


def _chosen(name: str, bits: Bits) -> tuple[int, ...]:
    return next(((bits[prefix],) for prefix in (*reversed(_path(name)), "") if prefix in bits), ())


def _batches(calibration: Tensor | Iterable | KeptImages | None,
             model: nn.Module) -> list[Inputs] | None:
    if calibration is None:
        return None
    if not isinstance(calibration, KeptImages):
        return calibration_batches(calibration, model)
    if calibration.batches is None:
        raise UserError("quantize needs the images of a calibration, and this one kept none; "
                        "calibrate with keep_images=True, or give the images")
    return calibration_batches(calibration.batches, model)


def token_layers(model: nn.Module, batches: Sequence[Inputs] | None) -> Groups:
    """The layers to quantise: plain linear layers that are called on tokens (…, N, d).

    A layer whose weight an attention reads for itself is not called, and stays float.
    """
    linears = {name: module for name, module in model.named_modules() if is_plain_linear(module)
               and not any(is_position_network(above) for above in _path(name))}
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.setdefault(name, args[0] if args else kwargs["input"])
        return hook

    image = batches[0][:1] if batches else example(model)
    try:
        with _hooked(model, {name: watch(name) for name in linears}):
            call(model, image)
    except Exception:
        require_taken(model, image)
        raise
    groups: dict[int, list[str]] = {}
    for name, x in seen.items():
        if x.ndim > 2:
            groups.setdefault(id(x), []).append(name)
    if not groups:
        raise UserError("no linear layer of this model works on tokens: there is nothing to "
                        "quantise")
    return list(groups.values())


def _path(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def rounded(model: nn.Module, groups: Groups, batches: list[Inputs] | None,
            bits: Callable[[str], Sequence[int]]) -> Iterator[tuple[str, QuantizedLinear]]:
    """Name and quantised form of each layer, for every number of bits that ``bits`` says of it.

    ``model`` stays as it is until the last one is made. Where there are images, covariances of a
    part of the layers are held at a time: of one block, or where blocks are not known of
    ``MOST_BYTES``, at a pass over the images each.
    """
    wanted = [group for group in groups if any(map(bits, group))]
    found: Found = ((group, None) for group in wanted)
    if batches is not None:
        found = _statistics(model, wanted, batches)
    for group, statistics in found:
        for name in group:
            for number in bits(name):
                linear = cast(nn.Linear, model.get_submodule(name))
                yield name, _layer(linear, statistics, number)


def _layer(linear: nn.Linear, statistics: LinearStatistics | None, bits: int) -> QuantizedLinear:
    found = round_linear(linear.weight, linear.bias, statistics, bits)
    layer = QUANTIZED[bits].like(linear)
    layer.weight.copy_(found.weight[0])
    layer.weight_scale.copy_(found.weight.scale)
    if layer.bias is not None and found.bias is not None:
        layer.bias.copy_(found.bias)
    return layer


def _statistics(model: nn.Module, groups: Groups, batches: list[Inputs]) -> Found:
    """Each group with mean and covariance of what its layers read."""
    encoder = encoder_parts(model)
    names = [] if encoder is None else [f"{encoder.name}.{index}."
                                        for index in range(len(encoder.blocks))]
    outside = [group for group in groups if not group[0].startswith(tuple(names))]
    for part in _parts(model, outside):
        def passed() -> None:
            for batch in progress(batches, "calibrating"):
                call(model, batch)
        yield from _watched(model, part, passed)
    if encoder is None or len(outside) == len(groups):
        return
    streams = [encoder.tokens(batch) for batch in batches]
    for block, name in zip(encoder.blocks, progress(names, "calibrating"), strict=True):
        def stepped(block: nn.Module = block) -> None:
            streams[:] = [encoder.step(block, stream) for stream in streams]
        yield from _watched(model, [group for group in groups if group[0].startswith(name)],
                            stepped)


def _parts(model: nn.Module, groups: Groups) -> Iterator[Groups]:
    """``groups`` in turn, as many at a time as have covariances of ``MOST_BYTES``."""
    part: Groups = []
    held = 0
    for group in groups:
        width = cast(nn.Linear, model.get_submodule(group[0])).in_features
        if part and held + 8 * width ** 2 > MOST_BYTES:
            yield part
            part, held = [], 0
        part.append(group)
        held += 8 * width ** 2
    if part:
        yield part


def _watched(model: nn.Module, groups: Groups, run: Callable[[], None]) -> Found:
    """Each group with the statistics of its first layer while ``run`` runs."""
    watching = {group[0]: LinearCollector() for group in groups}
    with _hooked(model, watching):
        run()
    for group in groups:
        found = collected({group[0]: watching.pop(group[0])}).get(group[0])
        yield group, cast(LinearStatistics | None, found)


@contextmanager
def _hooked(model: nn.Module, watching: Mapping[str, Any]) -> Iterator[None]:
    """Inside, each layer of these names shows what it is called with."""
    hooks = [model.get_submodule(name).register_forward_pre_hook(watch, with_kwargs=True)
             for name, watch in watching.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
