"""Weights that others trained, made to fit: other names, another resolution, other classes.

``load_weights_`` of ``weights.py`` demands a tensor of the right shape for every name. Here timm's
own converters come first, those that its pretrained weights pass through: they interpolate
positions and rename what the scripts of DINO, DINOv2, MAE, CLIP and others call by other names.
"""

import sys
import warnings
from collections.abc import Mapping
from typing import Any

from timm.models import is_model, model_entrypoint
from torch import Tensor, nn

from adacomcat.checkpoint.weights import StateDict, load_weights_
from adacomcat.errors import UserError, reason

BACKBONE = "backbone."  # where DINO's checkpoints keep the model, beside a head of their own


def load_foreign_(model: nn.Module, weights: Mapping[str, Tensor], source: str, *,
                  keep_head: bool = False) -> None:
    """Load ``weights`` into a timm model as its pretrained weights would be.

    A classifier of other classes is left out, and a warning says so: the model's own stays.

    Args:
        model: gets the weights in place.
        weights: what ``read_weights`` gives.
        source: what errors and warnings call the weights.
        keep_head: refuse weights without a classifier of the model's classes.

    Raises:
        UserError: names what is missing, unexpected or of another shape; the model is unchanged.
    """
    found = _without_backbone(dict(weights))
    if _shapes(found) != _shapes(model.state_dict()):
        found = _converted(found, model, source)
        found = _with_head_of(model, found, source, keep_head)
    load_weights_(model, found, source)


def _without_backbone(weights: StateDict) -> StateDict:
    inside = {name.removeprefix(BACKBONE): tensor for name, tensor in weights.items()
              if name.startswith(BACKBONE)}
    return inside or weights


def _converted(weights: StateDict, model: Any, source: str) -> StateDict:
    """``weights`` through the converter that timm has for this architecture, where it has one."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture or not is_model(architecture):
        return weights
    family = sys.modules[model_entrypoint(architecture).__module__]
    convert = getattr(family, "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    try:
        return dict(convert(weights, model))
    except Exception as error:  # whatever a converter stumbles over in the weights of another model
        raise UserError(f"{source} does not fit the model; timm cannot convert it: "
                        f"{reason(error)}") from error


def _with_head_of(model: Any, weights: StateDict, source: str, keep_head: bool) -> StateDict:
    """``weights`` with the model's own classifier where theirs is absent or of other classes."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    inside = tuple(f"{name}." for name in names)
    own = _starting(inside, model.state_dict())
    theirs = _starting(inside, weights)
    if _shapes(own) == _shapes(theirs):
        return weights
    if not theirs:
        problem = f"{source} has no classifier, and the model has one"
    elif not own:
        problem = f"{source} has a classifier, and the model has none"
    else:
        problem = (f"{source} has a classifier of {_classes(theirs)} classes, and the model one of "
                   f"{_classes(own)}")
    if keep_head and own:
        raise UserError(f"{problem}, whose outputs are wanted: pass --num-classes, or weights that "
                        "were trained for these classes")
    if own:
        warnings.warn(f"{problem}; that one starts at random", stacklevel=4)
    else:
        warnings.warn(f"{problem}; it is left out", stacklevel=4)
    return {name: tensor for name, tensor in weights.items() if name not in theirs} | own


def _starting(inside: tuple[str, ...], weights: Mapping[str, Tensor]) -> StateDict:
    return {name: tensor for name, tensor in weights.items() if name.startswith(inside)}


def _shapes(weights: StateDict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _classes(head: StateDict) -> int:
    """Rows of the last matrix."""
    return [0, *(len(tensor) for tensor in head.values() if tensor.ndim == 2)][-1]
