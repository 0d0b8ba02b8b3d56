"""Whether a module computes what its class says, so that its weights may be read in its place.

An adapter, a mask of ``torch.nn.utils.prune``, a parametrization, a hook, a ``forward`` that was
put on the instance or a quantised weight changes what a layer computes, and its ``weight`` may look
as before. The tables in ``registry``, ``sites`` and ``fuse`` ask here before they fold anything;
what is not plain is called as a module and stays as it is.
"""

import inspect

import torch
from timm.layers import Linear
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Where the hooks come from that a library attaches to its own modules, to record outputs.
_OBSERVERS = ("transformers.utils.output_capturing",)
# timm's own differs in TorchScript alone; MobileNetV3 and others have it as their classifier.
_LINEARS = (nn.Linear, Linear)
# Subclasses of nn.Linear that their libraries always use; nobody attached anything to them.
_LIBRARIES = ("adacomcat.", "timm.", "torch.nn.modules.")


def altered(module: nn.Module) -> bool:
    """Whether something on the instance changes what its class computes: hooks, or methods."""
    own = vars(module)
    return (any(_changes(hook) for hooks in _HOOKS for hook in own.get(hooks, {}).values())
            or any(inspect.isfunction(getattr(type(module), name, None)) for name in own))


def _changes(hook: object) -> bool:
    return getattr(hook, "__module__", None) not in _OBSERVERS


def altered_inside(module: nn.Module) -> bool:
    """Whether ``module`` or a module inside of it is altered."""
    return any(altered(part) for part in module.modules())


def is_plain(module: object, *kinds: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly of one of these classes, and not altered."""
    return type(module) in kinds and isinstance(module, nn.Module) and not altered(module)


def is_plain_linear(module: object) -> bool:
    """Whether ``module`` computes x Wᵀ + b of its own floating-point parameters, and no more."""
    return (is_plain(module, *_LINEARS) and isinstance(module, nn.Linear)
            and all(parameter is None or is_ordinary(parameter)
                    for parameter in (module.weight, module.bias)))


def is_altered_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer that someone changed, so that it must stay dense."""
    linear = isinstance(module, nn.Linear) or type(module).__name__.endswith("Linear")
    if not linear or is_plain_linear(module):
        return False
    from_library = f"{type(module).__module__}.".startswith(_LIBRARIES)
    return not from_library or altered(module) or type(module) in _LINEARS


def is_ordinary(parameter: object) -> bool:
    """Not quantised, not made anew by a mask at every call: a plain floating-point parameter."""
    return type(parameter) is nn.Parameter and parameter.dtype in _FLOATS
