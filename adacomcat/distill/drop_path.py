"""Stochastic depth: blocks whose branches are left out at random in training."""

from typing import Any

from timm.layers import DropPath, calculate_drop_path_rates
from torch import nn


def set_drop_path_(model: nn.Module, rate: float | None) -> nn.Module:
    """Give the branches of ``model``'s blocks rates that rise from 0 to ``rate``, as timm has them.

    Blocks are the modules that hold a ``drop_path``, as timm names it; None leaves all as it is.
    """
    if rate is None:
        return model
    blocks = [module for module in model.modules()
              if any(name.startswith("drop_path") for name, _ in module.named_children())]
    rates: Any = calculate_drop_path_rates(rate, len(blocks))
    for block, own in zip(blocks, rates, strict=True):
        for name, _ in list(block.named_children()):
            if name.startswith("drop_path"):
                setattr(block, name, DropPath(own) if own else nn.Identity())
    return model
