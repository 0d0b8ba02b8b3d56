"""What every room asks of a model: its input size, its modes, its tokens and outputs, copies."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.utils.inputs import Inputs, call

InputSize = tuple[int, int, int]


def input_size(model: nn.Module) -> InputSize:
    """(C, H, W) that the model was built for."""
    embed = getattr(model, "patch_embed", None)
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    traits = getattr(model, "_traits", {})  # timm's record of what the model was built for
    size = getattr(embed, "img_size", None) or traits.get("img_size") or _image_size(model)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    return (_image_channels(model, channels), height, width)


def _image_channels(model: Any, default: int) -> int:
    """What the model says itself, or those of its first convolution, which may see other maps."""
    known = getattr(model, "in_chans", None)
    if isinstance(known, int):
        return known
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return default if first is None else first.in_channels


def _image_size(model: Any) -> Any:
    """What models of transformers, torchvision and open_clip say themselves."""
    config = getattr(model, "config", None)
    for owner in (getattr(config, "vision_config", None), config, getattr(model, "visual", None),
                  model):
        size = getattr(owner, "image_size", None)
        if size is not None:
            return size if isinstance(size, int) else tuple(size)
    return None


def class_count(model: Any) -> int:
    """The number of outputs of the classifier that ``model`` has now; 0 where it has none.

    What a timm model says of itself is out of date after ``model.head = nn.Linear(…)``. Models of
    transformers have a number in their configuration, and may have no classifier.
    """
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(classifier, tuple):  # distilled models have two alike
        classifier = classifier[0]
    if type(classifier) is nn.Identity:
        return 0
    known = getattr(classifier, "out_features", getattr(model, "num_classes", None))
    return getattr(getattr(model, "config", None), "num_labels", 0) if known is None else known


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again after.

    A module that is put into the model meanwhile gets the mode of the one that holds it.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for above in model.modules():
            for module in above.children():
                if module not in modes:
                    module.training = above.training


def ancestors(module: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The modules that hold ``module``, the nearest first, ``model`` last."""
    name = next(name for name, found in model.named_modules() if found is module)
    names = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
    return [model.get_submodule(above) for above in names] + ([model] if name else [])


def replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where the module ``name`` of ``model`` stands: under each of its names.

    A module that several others share, such as the MLP of CoaT's parallel blocks, has several.
    """
    old = model.get_submodule(name)
    places = [(holder, child) for holder in model.modules()
              for child, part in holder._modules.items() if part is old]
    model.set_submodule(name, module)
    for holder, child in places:
        holder._modules[child] = module


def unwrapped(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` or a wrapper for several processes holds; other models as they are."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    compiled = model._modules.get("_orig_mod")
    return model if compiled is None else unwrapped(compiled)


def copied(model: nn.Module, views: bool = False) -> nn.Module:
    """A deep copy that keeps what users wrote to parameters, such as ``weight.lr_scale``.

    A mask of ``torch.nn.utils.prune`` leaves a computed weight on its layer, which Python cannot
    copy. The copy's layer computes it anew at its next call.

    Args:
        model: Any model.
        views: The copy's parameters are new ones in the memory of the model's.

    Raises:
        UserError: Something in the model cannot be copied.
    """
    computed = {id(value): value.detach().clone() for module in model.modules()
                for value in vars(module).values()
                if isinstance(value, Tensor) and not value.is_leaf}
    if views:
        computed |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    try:
        made = copy.deepcopy(model, computed)
    except Exception as error:  # whatever a module of someone else raises
        raise UserError(f"this model cannot be copied: {error}; compress_ changes it in place"
                        ) from error
    for parameter, original in zip(made.parameters(), model.parameters(), strict=True):
        vars(parameter).update(vars(original))
    return made


def tokens_and_outputs(model: Any, images: Inputs) -> list[Tensor]:
    """The final tokens and the head's outputs; the outputs alone where the model has no head.

    Of tuples, dictionaries and objects with tensors in their attributes, such as the dataclasses
    of other libraries, every floating-point tensor with one row for each image counts.

    Raises:
        UserError: There is no such tensor.
    """
    if hasattr(model, "forward_head") and isinstance(images, Tensor):
        tokens = model.forward_features(images)
        results = [tokens, model.forward_head(tokens)]
    else:
        results = [call(model, images)]
    found = [tensor for tensor in _tensors(results) if tensor.is_floating_point()
             and tensor.ndim and len(tensor) == len(images)]
    if not found:
        raise UserError(f"{type(model).__name__} returns no floating-point tensor with a row for "
                        "each image; errors of ranks cannot be measured")
    return found


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors in an output, in a fixed order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "__dict__") and not isinstance(output, nn.Module | type):
        for value in vars(output).values():
            yield from _tensors(value)
