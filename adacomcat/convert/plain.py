"""A compressed model in PyTorch's and timm's own modules, for other tools; and back.

Quantisers, adapters, pruners, TorchScript and fx know ``nn.Linear``; they pass over or refuse
low-rank layers. The plain model has the same factors in pairs of them.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from adacomcat.convert.install import join_mlps_
from adacomcat.convert.quantized import require_not_quantized
from adacomcat.errors import UserError
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.fused import FusedAttention, FusedDenseMlp, FusedMlp, FusedPatches
from adacomcat.layers.linear import LowRankLinear, unplain_linear
from adacomcat.layers.mlp import LowRankMlp
from adacomcat.layers.stock import LinearPair, PlainAttention
from adacomcat.utils.model import copied, replace_, unwrapped

_LOW_RANK = LowRankAttention | LowRankMlp | LowRankLinear
_FUSED = FusedAttention | FusedMlp | FusedDenseMlp | FusedPatches


def to_plain(model: nn.Module) -> nn.Module:
    """A copy whose low-rank layers are stock modules: the same function, parameters and cost.

    A low-rank linear layer becomes two ``nn.Linear`` in sequence, an MLP timm's ``Mlp`` of these,
    an attention four linear layers (q, k, v, proj) around PyTorch's attention. torchao, PEFT,
    ``torch.jit.script``, ``torch.fx``, hooks and pruning tools see every factor. It runs no kernel
    of this package before ``optimize`` fuses it. ``adacomcat.save`` keeps it, and ``from_plain``
    turns it back.

    Args:
        model: A compressed model, or one of the low-rank layers; it stays as it is.

    Raises:
        UserError: It comes from ``adacomcat.optimize``, or holds a low-rank attention of a class of
            your own that names no plain form.
    """
    require_not_optimized(model, "to_plain")
    return to_plain_(copied(unwrapped(model)))


def to_plain_(model: nn.Module) -> nn.Module:
    """``to_plain`` in place; returns the plain form of a low-rank layer itself."""
    return _replaced(model, _LOW_RANK, lambda module: module.to_plain())


def from_plain(model: nn.Module) -> nn.Module:
    """A copy with the low-rank layers again, which run on kernels: the inverse of ``to_plain``.

    Args:
        model: What ``to_plain`` made, trained or pruned since; it stays as it is.

    Raises:
        UserError: A linear layer is quantised or carries an adapter.
    """
    require_not_quantized(model, "from_plain")
    made = _replaced(copied(unwrapped(model)), LinearPair | PlainAttention, _unplain)
    join_mlps_(made)
    return made


def is_plain_form(model: nn.Module) -> bool:
    """Whether ``to_plain`` made this model."""
    return any(isinstance(module, LinearPair | PlainAttention) for module in model.modules())


def is_optimized(model: nn.Module) -> bool:
    """Whether ``adacomcat.optimize`` fused something in this model."""
    return any(isinstance(module, _FUSED) for module in model.modules())


def require_not_optimized(model: nn.Module, what: str) -> None:
    """
    Raises:
        UserError: ``model`` comes from ``adacomcat.optimize``.
    """
    if is_optimized(model):
        raise UserError(f"{what} takes the model that adacomcat.optimize was given, not its "
                        "optimized copy: norms and scales are folded into its weights")


def _unplain(module: Any) -> nn.Module:
    if isinstance(module, LinearPair):
        return unplain_linear(module)
    return module.made_from.from_plain(module)


def _replaced(model: nn.Module, kinds: Any, make: Any) -> nn.Module:
    """``model`` with ``make(module)`` in the place of the outermost modules of these ``kinds``."""
    if isinstance(model, kinds):
        return make(model)
    for name in list(_outermost(model, kinds)):
        replace_(model, name, make(model.get_submodule(name)))
    return model


def _outermost(model: nn.Module, kinds: Any) -> Iterator[str]:
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not (inside and name.startswith(inside)) and isinstance(module, kinds):
            inside = (*inside, name + ".")
            yield name
