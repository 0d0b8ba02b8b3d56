"""How near a compressed backbone is to the dense one: both models' final tokens on some images."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.inference_mode()
def tokens(model: nn.Module, images: Tensor) -> Tensor:
    """The tokens after the last norm, (N, tokens, d)."""
    backbone: Any = model  # timm's models have forward_features
    return torch.cat([backbone.forward_features(batch) for batch in images.split(16)])


def compare(dense: Tensor, compressed: Tensor) -> tuple[float, float]:
    """(relative error of the tokens, mean cosine of the class tokens), for tokens (N, tokens, d).

    The error is |compressed - dense|² / |dense - mean token|²: 1 is no better than the mean token.
    """
    spread = (dense - dense.mean((0, 1))).square().sum()
    cosine = F.cosine_similarity(dense[:, 0], compressed[:, 0]).mean()
    return ((compressed - dense).square().sum() / spread).item(), cosine.item()
