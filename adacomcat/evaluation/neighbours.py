"""Classes from the nearest training images, without a head and without training."""

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO (Caron et al., arXiv 2104.14294)
ROWS = 1024  # images that are compared with all training images at once


def knn_scores(train: Tensor, labels: Tensor, test: Tensor, classes: int,
               k: int = NEIGHBOURS, temperature: float = TEMPERATURE) -> Tensor:
    """(N, classes): Σ exp(cosine / T) over those of the k nearest training images of a class.

    Args:
        train: features of the training images, (M, d).
        labels: their classes, (M,).
        test: features of the images to classify, (N, d).
        classes: how many there are.
        k: how many neighbours count; at most M do.
        temperature: T.
    """
    train = F.normalize(train.float(), dim=1)
    scores = []
    for rows in F.normalize(test.float(), dim=1).split(ROWS):
        cosine, nearest = (rows @ train.T).topk(min(k, len(train)))
        votes = (cosine / temperature).exp()
        scores.append(votes.new_zeros(len(rows), classes).scatter_add_(1, labels[nearest], votes))
    return torch.cat(scores)


def nearest_others(features: Tensor, k: int) -> Tensor:
    """(N, k) indices of the k images whose features point closest to each image's own."""
    features = F.normalize(features.float(), dim=1)
    found = []
    for start in range(0, len(features), ROWS):
        cosine = features[start:start + ROWS] @ features.T
        itself = torch.arange(len(cosine))
        cosine[itself, itself + start] = -torch.inf
        found.append(cosine.topk(min(k, len(features) - 1)).indices)
    return torch.cat(found)
