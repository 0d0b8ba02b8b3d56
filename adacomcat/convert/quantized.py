"""Which layers of a model are quantised, and the same layers in another model, still empty.

``checkpoint`` writes their names down and timm's entry point makes the layers of them; what cannot
work on them refuses here.
"""

from collections.abc import Iterable

from torch import nn

from adacomcat.errors import UserError
from adacomcat.layers.packed import PackedModule
from adacomcat.layers.plain import is_plain_linear
from adacomcat.layers.quantized import QUANTIZED, QuantizedLinear
from adacomcat.utils.model import replace_


def quantized_layers(model: nn.Module, bits: int | None = None) -> list[str]:
    """The names of all layers on so many bits; of all quantised ones where not given."""
    return [name for name, module in model.named_modules()
            if isinstance(module, QuantizedLinear) and bits in (None, module.bits)]


def is_quantized(model: nn.Module) -> bool:
    """Whether ``adacomcat.quantize`` made this model, optimised or not."""
    return any(isinstance(module, QuantizedLinear) or (isinstance(module, PackedModule)
                                                  and module.is_int8)
               for module in model.modules())


def require_not_quantized(model: nn.Module, what: str) -> None:
    """
    Raises:
        UserError: ``model`` comes from ``adacomcat.quantize``.
    """
    if is_quantized(model):
        raise UserError(f"{what} takes the model that adacomcat.quantize was given, not its "
                        "quantised copy: quantising comes last")


def quantized_skeleton_(model: nn.Module, names: Iterable[str], bits: int) -> nn.Module:
    """In place: quantised layers of these names, their weights still zero, nothing trains.

    Raises:
        UserError: A name is no linear layer of the model.
    """
    layers = dict(model.named_modules())
    for name in names:
        linear = layers.get(name)
        if not (isinstance(linear, nn.Linear) and is_plain_linear(linear)):
            raise UserError(f"int{bits} names {name!r:.100}, which is no linear layer of this "
                            "model")
        replace_(model, name, QUANTIZED[bits].like(linear))
    return model.requires_grad_(False)
