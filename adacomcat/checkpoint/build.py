"""Models by timm's name and arguments, which come from flags or from a file: judged, then built.

A model is made on the meta device first, without numbers, where a wrong argument or an image that
does not fit costs no memory.
"""

import contextlib
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from adacomcat.checkpoint.config import CONFIG
from adacomcat.checkpoint.weights import require_fit
from adacomcat.errors import UserError, reason
from adacomcat.utils.model import input_size

NUMBERS = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads")
MOST_PARTS = 10_000  # modules and parameters of one model; timm's largest have a third


def require_architecture(name: object) -> None:
    """Raise a ``UserError`` with similar names where timm does not know ``name``."""
    if isinstance(name, str) and timm.is_model(name):
        return
    near = get_close_matches(str(name)[:100], timm.list_models(), n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() lists all"
    raise UserError(f"timm has no model {name!r:.100}{hint}")


def create(name: str, model_args: Mapping[str, Any], **options: Any) -> nn.Module:
    """``timm.create_model(name, **options, **model_args)``, judged where there are arguments.

    Raises:
        UserError: timm refuses an argument, an image cannot pass through the model, or the machine
            has not as much memory.
    """
    with _told(name, model_args):
        make = _bounded(lambda **given: timm.create_model(name, **given, **model_args))
        if model_args:
            _require_numbers(model_args)
            _require_sound(_outline(make))
        return make(**options)


def outline(name: str, model_args: Mapping[str, Any]) -> nn.Module:
    """The model of ``create`` on the meta device, without weights.

    Where its constructor reads numbers, the model has random weights.

    Raises:
        UserError: As in ``create``.
    """
    with _told(name, model_args):
        _require_numbers(model_args)
        make = _bounded(lambda: timm.create_model(name, **model_args))
        made = _outline(make)
        if model_args:
            _require_sound(made)
        return make() if made is None else made


@contextlib.contextmanager
def _told(name: str, model_args: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the errors of timm's constructors become a ``UserError``."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # whatever timm's constructors stumble over
        raise UserError(f"cannot make {name} with {dict(model_args)}: {reason(error)}") from error


def build(config: Mapping[str, Any], source: str,
          weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The model that a config.json describes, to which ``weights`` are then loaded.

    Args:
        config: what ``read_config`` gives.
        source: what the errors call its folder.
        weights: those that the model will get, where a file has them: nothing larger than they are
            is built, and parameters hold no numbers yet. None: parameters are random.

    Raises:
        UserError: timm refuses the description, or it does not fit the weights.
    """
    args = dict(config.get("model_args", {}))
    require_architecture(args.get("base", config["architecture"]))
    require_architecture(config["architecture"])
    pretrained_cfg = dict(config.get("pretrained_cfg") or {})
    if pretrained_cfg and "num_classes" in config:
        pretrained_cfg["num_classes"] = config["num_classes"]

    most = MOST_PARTS if weights is None else min(MOST_PARTS, 1000 + 64 * len(weights))
    make = _bounded(lambda: timm.create_model(
        config["architecture"], pretrained=False, pretrained_cfg=pretrained_cfg or None, **args),
        most)
    try:
        _require_numbers(args)
        if weights is not None:
            _require_no_larger(args, weights)
            outline = _outline(make)
            if outline is not None:
                require_fit(outline, weights, source)
                _require_sound(outline)
                with _Unfilled():
                    return make()
        return make()
    except UserError:
        raise
    except Exception as error:  # whatever timm's constructors stumble over
        raise UserError(f"{source}: its {CONFIG} describes no model that can be built: "
                        f"{reason(error)}") from error


def _bounded(make: Callable[..., nn.Module], most: int = MOST_PARTS) -> Callable[..., nn.Module]:
    """``make``, which stops once it has made so many modules and parameters."""
    def bounded(**given: Any) -> nn.Module:
        with _at_most(most):
            return make(**given)
    return bounded


@contextlib.contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Inside, the constructors of this thread make at most so many modules and parameters."""
    thread, made = threading.get_ident(), 0

    def count(module: nn.Module, name: str, part: object) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > most:
            raise ValueError(f"it has more than {most:,} modules and parameters")

    handles = (register_module_parameter_registration_hook(count),
               register_module_module_registration_hook(count))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Unfilled(TorchFunctionMode):
    """Inside, parameters get no random numbers, which are slow and which others replace."""

    SKIPPED = frozenset(("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_",
                         "kaiming_uniform_", "kaiming_normal_"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in self.SKIPPED:
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **(kwargs or {}))


def _outline(make: Callable[[], nn.Module]) -> nn.Module | None:
    """The model without numbers; None where its constructor needs them."""
    try:
        with torch.device("meta"), _Unfilled(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model itself warns again
            return make().eval()
    except Exception as error:
        if "meta" in str(error):
            return None
        raise


def _integers(model_args: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in model_args.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if type(number) is int:
                yield name, number


def _require_numbers(model_args: Mapping[str, Any]) -> None:
    """Refuse a depth of 10⁹, for which timm lists a drop rate each before it makes a block.

    True is no number either: models take it for 1 until they reshape.
    """
    for name, value in model_args.items():
        if isinstance(value, bool) and name in NUMBERS:
            raise ValueError(f"{name} must be a number; got {value}")
    for name, number in _integers(model_args):
        if ("depth" in name or "layers" in name) and number > MOST_PARTS:
            raise ValueError(f"{name} {number} makes more than {MOST_PARTS:,} modules")


def _require_no_larger(model_args: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse numbers that no model with these weights can have, like a width of 10⁹."""
    most = sum(tensor.numel() for tensor in weights.values())
    for name, number in _integers(model_args):
        if abs(number) > most:
            raise ValueError(f"{name} {number} is more than its weights have numbers ({most})")


def _require_sound(outline: nn.Module | None) -> None:
    """Refuse layers without numbers, more memory than there is, and images that do not pass."""
    if outline is None:
        return
    empty = [name for name, parameter in outline.named_parameters() if not parameter.numel()]
    if empty:
        raise ValueError(f"{empty[0]} would have no numbers")
    for name, module in outline.named_modules():
        if isinstance(module, nn.Conv2d) and len(module.kernel_size) != 2:  # passes on meta
            raise ValueError(f"{name} would have a kernel of {len(module.kernel_size)} sizes")
    size = sum(t.numel() * t.element_size() for t in (*outline.parameters(), *outline.buffers()))
    if size > (memory := _memory()):
        raise ValueError(f"it would take {size / 2**30:.0f} GiB; this machine has "
                         f"{memory / 2**30:.0f} GiB")
    try:
        with torch.no_grad():
            found = outline(torch.empty(1, *input_size(outline), device="meta"))
    except Exception as error:
        if "meta" in str(error):  # the model looks at numbers on its way
            return
        raise
    if not isinstance(found, Tensor):
        raise ValueError(f"its output is a {type(found).__name__} and no tensor")


def _memory() -> float:
    """Bytes of this machine's memory; infinity where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
