"""config.json of a checkpoint folder, judged before anything is made of it."""

import inspect
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from timm.data.transforms import str_to_interp_mode
from timm.models import build_model_with_cfg

from adacomcat.errors import UserError
from adacomcat.sites import DENSE
from adacomcat.utils.text import parse_json, read_text

CONFIG = "config.json"
MOST_PIXELS = 1 << 28  # of an image, over its channels

# Arguments that timm takes beside those of a model: with them a file could name other files.
NO_MODEL_ARGS = frozenset(name for function in (timm.create_model, build_model_with_cfg)
                          for name, parameter in inspect.signature(function).parameters.items()
                          if parameter.kind is not parameter.VAR_KEYWORD)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        UserError: it cannot be read, names no architecture, or has an entry of a wrong type.
    """
    if not os.path.isdir(folder):
        raise UserError(f"there is no checkpoint folder {folder}")
    if not os.path.isfile(folder / CONFIG):
        raise UserError(f"{folder} is no checkpoint folder: it has no {CONFIG}")
    try:
        config = parse_json(read_text(folder / CONFIG))
    except ValueError as error:
        raise UserError(f"{folder}: {CONFIG} cannot be read ({error})") from error
    known = isinstance(config, dict) and isinstance(config.get("architecture"), str)
    if not known or not isinstance(config.get("model_args", {}), dict):
        raise UserError(f"{folder}: {CONFIG} names no 'architecture' with 'model_args'; "
                        "was it written by adacomcat or timm?")
    _require_entries(config, _TOP, f"{folder}: {CONFIG}")
    _require_entries(config.get("model_args", {}), _MODEL_ARGS, f"{folder}: {CONFIG}: model_args")
    _require_entries(config.get("pretrained_cfg") or {}, _PRETRAINED,
                     f"{folder}: {CONFIG}: pretrained_cfg")
    if foreign := sorted(NO_MODEL_ARGS & config.get("model_args", {}).keys()):
        raise UserError(f"{folder}: {CONFIG}: model_args has {', '.join(foreign)}, which is no "
                        "argument of a model; remove it")
    return config


Check = Callable[[Any], bool]


def _require_entries(entries: Mapping[str, Any], checks: Mapping[str, tuple[Check, str]],
                     where: str) -> None:
    for name, (holds, wanted) in checks.items():
        value = entries.get(name)
        if value is not None and not holds(value):
            raise UserError(f"{where}: {name} must be {wanted}; got {value!r:.60}")


def _whole(value: Any, least: int = 1, most: int = 2**31 - 1) -> bool:
    return type(value) is int and least <= value <= most


def _numbers(value: Any, least: float) -> bool:
    return (isinstance(value, list) and 1 <= len(value) <= 64
            and all(type(v) in (int, float) and math.isfinite(v) and v > least for v in value))


def _is_size(value: Any) -> bool:
    return (isinstance(value, list) and len(value) == 3 and all(map(_whole, value))
            and math.prod(value) <= MOST_PIXELS)


def _is_plan(value: Any) -> bool:
    return isinstance(value, dict) and all(rank == DENSE or _whole(rank)
                                           for rank in value.values())


def _is_interpolation(value: Any) -> bool:
    try:
        return value == "random" or bool(str_to_interp_mode(value))
    except (KeyError, TypeError):
        return False


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _names(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)


_SIZE = (_is_size, "a size [channels, height, width]")
_WORD = (lambda value: isinstance(value, str)), "a word"
_CLASSES = (lambda value: _whole(value, 0)), "a whole number of at least 0"
_FLAG = (lambda value: isinstance(value, bool)), "true or false"
_SHARE = (lambda value: _numbers([value], 0) and value <= 10), "a number in (0, 10]"
_NAMES = (_names, "a name or a list of names")
_LAYERS = (_are_names, "a list of names of layers")

# Entry → (whether a value will do, what it must be). None always will, as in timm.
_TOP: Mapping[str, tuple[Check, str]] = {
    "num_classes": _CLASSES,
    "pretrained_cfg": ((lambda value: isinstance(value, dict)), "an object {…}"),
}
_MODEL_ARGS: Mapping[str, tuple[Check, str]] = {
    "base": _WORD, "plan": (_is_plan, 'an object of ranks, like {"blocks.0.attn.qk": 32}'),
    "plain": _FLAG, "int8": _LAYERS, "int4": _LAYERS, "num_classes": _CLASSES,
    "in_chans": (_whole, "a whole number of at least 1"),
}
_PRETRAINED: Mapping[str, tuple[Check, str]] = {
    "num_classes": _CLASSES, "architecture": _WORD, "tag": _WORD,
    "input_size": _SIZE, "test_input_size": _SIZE, "min_input_size": _SIZE,
    "fixed_input_size": _FLAG, "interpolation": (_is_interpolation, "an interpolation of timm"),
    "crop_pct": _SHARE, "test_crop_pct": _SHARE, "crop_mode": _WORD,
    "mean": ((lambda value: _numbers(value, -math.inf)), "a list of numbers"),
    "std": ((lambda value: _numbers(value, 0)), "a list of numbers above 0"),
    "classifier": _NAMES, "first_conv": _NAMES,
}
