"""``quantize``: a dense or compressed model → a copy whose projections are int8."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from adacomcat.calibration import Calibration
from adacomcat.convert.calibrate import (
    LinearCollector,
    calibration_batches,
    collected,
    require_taken,
)
from adacomcat.convert.factors import require_finite_model
from adacomcat.convert.plain import require_not_optimized, to_plain
from adacomcat.convert.quantized import require_not_quantized
from adacomcat.errors import UserError
from adacomcat.factorize.factors import LinearStatistics
from adacomcat.layers.int8 import Int8Linear
from adacomcat.layers.plain import is_plain_linear
from adacomcat.layers.registry import example, is_position_network
from adacomcat.quantization.fold import (
    fold_norms_,
    folding_attentions,
    move_value_bias_,
    rotate_middles_,
)
from adacomcat.quantization.rounding import round_linear
from adacomcat.utils.inputs import Inputs, call
from adacomcat.utils.limits import QUANTIZATIONS
from adacomcat.utils.progress import progress

Groups = list[list[str]]  # names of layers, those together that read the same tensor


@torch.no_grad()
def quantize(model: nn.Module, calibration: Tensor | Iterable | Calibration | None = None,
             dtype: str = "int8") -> nn.Module:
    """A copy of ``model`` on int8 weights and activations, in eval mode; it does not train.

    The linear layers that work on tokens become int8: one scale for each output channel of a
    weight, one for each token of an activation, at every call. The head, embeddings, norms and
    attention's softmax stay float. Low-rank layers get their plain form (``to_plain``) first, and
    what stands between layers is folded into them. ``optimize`` puts the result on int8 kernels.

    Args:
        model: A dense or a compressed model; it stays as it is. This is the last step before
            ``optimize``: nothing compresses or trains the result.
        calibration: Images (N, C, H, W) as the model sees them, an iterable of batches, or a
            ``Calibration`` that kept its images. They correct the errors of rounding. Without
            images every weight goes to the nearest of its grid.
        dtype: 'int8'.

    Raises:
        UserError: The model comes from ``optimize`` or ``quantize``, has no linear layer that works
            on tokens, or a weight or an image is not finite.
    """
    if dtype not in QUANTIZATIONS:
        raise UserError(f"quantize knows the dtype {', '.join(QUANTIZATIONS)}; got {dtype!r:.40}")
    require_not_optimized(model, "quantize")
    require_not_quantized(model, "quantize")
    require_finite_model(model)
    own = next(model.parameters()).dtype
    made = to_plain(model).float().eval().requires_grad_(False)
    return quantize_(made, _batches(calibration, made)).to(own)


def quantize_(model: nn.Module, batches: list[Inputs] | None, rotate: bool = True) -> nn.Module:
    """``quantize`` in place, for a plain model in float32; rotate: also the middles of factors."""
    groups = _groups(model, batches)
    fold_norms_(model)
    attentions = folding_attentions(model)
    for attn in attentions:
        move_value_bias_(attn)
    if rotate:
        rotate_middles_(model)
    _round_(model, groups, batches)
    for attn in attentions:  # what rounding gave the values
        move_value_bias_(attn)
    return model


def _batches(calibration: Tensor | Iterable | Calibration | None,
             model: nn.Module) -> list[Inputs] | None:
    if calibration is None:
        return None
    if not isinstance(calibration, Calibration):
        return calibration_batches(calibration, model)
    if calibration.batches is None:
        raise UserError("quantize needs the images of a calibration, and this one kept none; "
                        "calibrate with keep_images=True, or give the images")
    return calibration_batches(calibration.batches, model)


def _groups(model: nn.Module, batches: Sequence[Inputs] | None) -> Groups:
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

    hooks = [module.register_forward_pre_hook(watch(name), with_kwargs=True)
             for name, module in linears.items()]
    image = batches[0][:1] if batches else example(model)
    try:
        call(model, image)
    except Exception:
        require_taken(model, image)
        raise
    finally:
        for hook in hooks:
            hook.remove()
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


def _round_(model: nn.Module, groups: Groups, batches: list[Inputs] | None) -> None:
    """In place: int8 layers, with statistics of what they read where there are images."""
    known = {} if batches is None else _statistics(model, groups, batches)
    for group in groups:
        found = known.pop(group[0], None)
        for name in group:
            linear = cast(nn.Linear, model.get_submodule(name))
            model.set_submodule(name, _int8(linear, found))


def _int8(linear: nn.Linear, statistics: LinearStatistics | None) -> Int8Linear:
    found = round_linear(linear.weight, linear.bias, statistics)
    layer = Int8Linear.like(linear)
    layer.weight.copy_(found.weight.q)
    layer.weight_scale.copy_(found.weight.scale)
    if layer.bias is not None and found.bias is not None:
        layer.bias.copy_(found.bias)
    return layer


def _statistics(model: nn.Module, groups: Groups,
                batches: list[Inputs]) -> dict[str, LinearStatistics]:
    """First layer of a group → mean and covariance of what the group reads."""
    watching = {group[0]: LinearCollector() for group in groups}
    hooks = [model.get_submodule(name).register_forward_pre_hook(collect, with_kwargs=True)
             for name, collect in watching.items()]
    try:
        for batch in progress(batches, "calibrating"):
            call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return cast(dict[str, LinearStatistics], collected(dict(watching)))
