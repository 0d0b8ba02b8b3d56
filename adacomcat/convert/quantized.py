"""Which layers of a model are int8, and the same layers in another model, still empty.

``checkpoint`` writes their names down and timm's entry point makes the layers of them; what cannot
work on int8 refuses here.
"""

from collections.abc import Iterable

from torch import nn

from adacomcat.errors import UserError
from adacomcat.layers.int8 import Int8Linear
from adacomcat.layers.packed import PackedModule
from adacomcat.layers.plain import is_plain_linear


def int8_layers(model: nn.Module) -> list[str]:
    """The names of all ``Int8Linear`` layers."""
    return [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]


def is_quantized(model: nn.Module) -> bool:
    """Whether ``adacomcat.quantize`` made this model, optimised or not."""
    return any(isinstance(module, Int8Linear) or (isinstance(module, PackedModule)
                                                  and module.is_int8)
               for module in model.modules())


def require_not_quantized(model: nn.Module, what: str) -> None:
    """
    Raises:
        UserError: ``model`` comes from ``adacomcat.quantize``.
    """
    if is_quantized(model):
        raise UserError(f"{what} takes the model that adacomcat.quantize was given, not its int8 "
                        "copy: quantising comes last")


def int8_skeleton_(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """In place: ``Int8Linear`` layers of these names, their weights still zero, nothing trains.

    Raises:
        UserError: A name is no linear layer of the model.
    """
    layers = dict(model.named_modules())
    for name in names:
        linear = layers.get(name)
        if not (isinstance(linear, nn.Linear) and is_plain_linear(linear)):
            raise UserError(f"int8 names {name!r:.100}, which is no linear layer of this model")
        model.set_submodule(name, Int8Linear.like(linear))
    return model.requires_grad_(False)
