"""What a parameter of a drop-in takes over from the dense parameter that it stands for."""

from collections.abc import Mapping

from torch import Tensor, nn


def inherit_(made: nn.Module, dense: nn.Module, origins: Mapping[str, Tensor | None]) -> None:
    """``requires_grad`` and what users wrote to a parameter, such as ``weight.lr_scale``.

    Args:
        made: the drop-in.
        dense: the module that it replaces. Where it is frozen as a whole, so is the drop-in.
        origins: name of a parameter of ``made`` → the parameter of ``dense`` it comes from.
    """
    frozen = not any(parameter.requires_grad for parameter in dense.parameters())
    for name, parameter in made.named_parameters():
        origin = origins.get(name)
        if origin is not None:
            parameter.requires_grad_(origin.requires_grad)
            vars(parameter).update(vars(origin))
        elif frozen:
            parameter.requires_grad_(False)
