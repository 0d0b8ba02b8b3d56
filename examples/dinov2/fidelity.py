"""How near a compressed backbone stays to the dense one: its final tokens on the same images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.inference_mode()
def tokens(model: nn.Module, images: Tensor) -> Tensor:
    """(N, tokens, d) after the last norm."""
    return torch.cat([model.forward_features(batch) for batch in images.split(16)])


def compare(dense: Tensor, compressed: Tensor) -> tuple[float, float]:
    """(relative error of the final tokens, 1 = no better than the mean; cls cosine)."""
    spread = (dense - dense.mean((0, 1))).square().sum()
    cosine = F.cosine_similarity(dense[:, 0], compressed[:, 0]).mean()
    return ((compressed - dense).square().sum() / spread).item(), cosine.item()
