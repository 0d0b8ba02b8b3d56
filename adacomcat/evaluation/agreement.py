"""How far a compressed model agrees with the dense one, with labels and without."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.convert.calibrate import BATCH
from adacomcat.errors import UserError
from adacomcat.evaluation.neighbours import nearest_others
from adacomcat.evaluation.passes import embedding
from adacomcat.evaluation.scores import bootstrap_interval
from adacomcat.utils.inputs import Inputs
from adacomcat.utils.model import evaluating, tokens_and_outputs
from adacomcat.utils.progress import progress

SHARED = 5  # nearest neighbours that are compared


def flips(ours: Tensor, dense: Tensor, labels: Tensor) -> dict[str, Any]:
    """Percentages of images whose likeliest class differs from the dense model's.

    Args:
        ours: (N, ≥ 1) classes by the compressed model, the likeliest first.
        dense: the same by the dense model.
        labels: (N,).

    Returns:
        'flips', of which 'lost' were right and 'won' are right now, and 'top1_difference' in
        points with its paired 'top1_difference_interval'.
    """
    right, before = ours[:, 0] == labels, dense[:, 0] == labels
    gain = 100 * (right.double() - before.double())
    def percent(flag: Tensor) -> float:
        return 100 * flag.double().mean().item()

    return {"flips": percent(ours[:, 0] != dense[:, 0]), "lost": percent(before & ~right),
            "won": percent(right & ~before), "top1_difference": gain.mean().item(),
            "top1_difference_interval": bootstrap_interval(gain)}


class Agreement(NamedTuple):
    """Two models on the same images, which need no labels.

    token_error: Σ |ours - dense|² / Σ |dense - mean|² over final tokens; 0 is exact, 1 no better
        than the mean token.
    cosine, cosine_interval: mean over images of the cosine between both models' embeddings.
    neighbours, neighbours_interval: percent of the ``SHARED`` nearest other images by the dense
        model that are among the nearest by ours.
    """

    images: int
    token_error: float
    cosine: float
    cosine_interval: list[float]
    neighbours: float
    neighbours_interval: list[float]


class _Spread:
    """|ours - dense|² against |dense - mean|², summed in float64 over batches."""

    def __init__(self) -> None:
        self.count, self.error, self.square = 0, 0.0, 0.0
        self.sum: Tensor | float = 0.0

    def add(self, ours: Tensor, dense: Tensor) -> None:
        ours, dense = ours.double().flatten(0, -2), dense.double().flatten(0, -2)
        self.error += (ours - dense).square().sum().item()
        self.count += len(dense)
        self.sum = self.sum + dense.sum(0)
        self.square += dense.square().sum().item()

    @property
    def relative(self) -> float:
        mean = torch.as_tensor(self.sum) / self.count
        spread = self.square - self.count * mean.square().sum().item()
        return self.error / max(spread, 1e-30)


@torch.inference_mode()
def agreement(model: nn.Module, dense: nn.Module, batches: Sequence[Inputs]) -> Agreement:
    """``model`` beside the ``dense`` one on these images.

    Args:
        model: the compressed model.
        dense: the dense model, on the same device.
        batches: images (B, C, H, W), as ``convert.calibrate.calibration_batches`` gives them.

    Raises:
        UserError: there are fewer than two images, or the tokens of the models differ in shape.
    """
    spread = _Spread()
    found: list[list[Tensor]] = [[], []]
    with evaluating(model), evaluating(dense):
        for images in progress([part for batch in batches for part in batch.split(BATCH)],
                               "comparing"):
            ours, theirs = (tokens_and_outputs(of, images)[0] for of in (model, dense))
            if ours.shape != theirs.shape:
                raise UserError(f"the final tokens of one image are {tuple(ours.shape[1:])} and "
                                f"the dense model's {tuple(theirs.shape[1:])}: name the model "
                                "that was compressed")
            spread.add(ours, theirs)
            for rows, of in zip(found, (model, dense), strict=True):
                rows.append(embedding(of, images).cpu())
    ours, theirs = (torch.cat(rows) for rows in found)
    if len(ours) < 2:
        raise UserError("neighbours are compared among images: give at least two")
    cosine = F.cosine_similarity(ours, theirs, dim=1)
    shared = _shared(nearest_others(ours, SHARED), nearest_others(theirs, SHARED))
    return Agreement(len(ours), spread.relative, cosine.double().mean().item(),
                     bootstrap_interval(cosine), shared.mean().item(), bootstrap_interval(shared))


def _shared(ours: Tensor, dense: Tensor) -> Tensor:
    """(N,) percent of each row of ``dense`` that is in the same row of ``ours``."""
    return 100 * (dense[:, :, None] == ours[:, None, :]).any(-1).double().mean(-1)
