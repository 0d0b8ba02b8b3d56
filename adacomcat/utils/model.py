"""What every room asks of a model: its input size, its modes, its tokens and outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

InputSize = tuple[int, int, int]


def input_size(model: nn.Module) -> InputSize:
    """(C, H, W) that the model was built for."""
    embed = getattr(model, "patch_embed", None)
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    size = getattr(embed, "img_size", None)
    if size is not None:
        height, width = size
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return (first.in_channels if first is not None else channels, height, width)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tokens_and_outputs(model: Any, images: Tensor) -> list[Tensor]:
    """The final tokens and the head's outputs; the outputs alone where the model has no head."""
    if not hasattr(model, "forward_head"):
        return [model(images)]
    tokens = model.forward_features(images)
    return [tokens, model.forward_head(tokens)]
