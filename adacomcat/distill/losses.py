"""What the student is asked: labels, the teacher's outputs, the teacher's blocks."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.errors import UserError

KD = ("soft", "hard", "none")
ALIGN = ("mse", "manifold", "none")
RANDOM_TOKENS = 192  # of a batch, for the third Gram matrix of the manifold loss


def distillation_loss(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """soft: T² KL(teacher/T ‖ student/T); hard: CE against the teacher's argmax. (B, classes)"""
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(-1))
    if kind == "soft":
        divergence = F.kl_div((student / temperature).log_softmax(-1),
                              (teacher / temperature).log_softmax(-1),
                              log_target=True, reduction="batchmean")
        return divergence * temperature ** 2
    raise UserError(f"unknown distillation {kind!r}; choose one of {', '.join(KD)}")


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|² / |teacher|²."""
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|² / |teacher - mean|², the mean over all but the last dimension; float32.

    1 is no better than that mean.
    """
    student, teacher = student.float().flatten(0, -2), teacher.float().flatten(0, -2)
    spread = (teacher - teacher.mean(0)).square().sum().clamp_min(1e-30)
    return (student - teacher).square().sum() / spread


def manifold_loss(student: Tensor, teacher: Tensor, chosen: Tensor) -> Tensor:
    """Σ |M(student) - M(teacher)|² over three Gram matrices of normalised tokens (B, N, d).

    Tokens of one image (B, N, N), tokens of one place in all images (N, B, B), and ``chosen``
    tokens of the whole batch.
    """
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    total = student.new_zeros(())
    for view in (lambda f: f, lambda f: f.transpose(0, 1), lambda f: f.flatten(0, 1)[chosen]):
        gram_student, gram_teacher = (_gram(view(features)) for features in (student, teacher))
        total = total + F.mse_loss(gram_student, gram_teacher)
    return total


def _gram(features: Tensor) -> Tensor:
    return features @ features.mT


def alignment_decay(epoch: int, epochs: int) -> float:
    """cos(π/2 · (epoch - 1) / epochs): 1 in the first epoch, towards 0 in the last."""
    return math.cos(math.pi / 2 * (epoch - 1) / max(1, epochs))


class BlockFeatures:
    """Keeps the outputs of chosen ``model.blocks`` of the latest forward pass."""

    def __init__(self, model: nn.Module, indices: Sequence[int]) -> None:
        self.outputs: dict[int, Tensor] = {}
        self._handles = [model.blocks[index].register_forward_hook(self._keep(index))
                         for index in indices]

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            self.outputs[index] = output
        return hook

    def take(self) -> list[Tensor]:
        """The outputs, (B, N, d) each, which are then forgotten."""
        kept = [output.flatten(1, -2) for _, output in sorted(self.outputs.items())]
        self.outputs = {}
        return kept

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def aligned_blocks(model: nn.Module, chosen: Sequence[int] | None) -> list[int]:
    """Block indices: the chosen ones, by default the first two and the last two."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        warnings.warn(f"{type(model).__name__} has no .blocks: no features are aligned",
                      stacklevel=2)
        return []
    count = len(blocks)
    if chosen is None:
        return sorted({0, 1, count - 2, count - 1} & set(range(count)))
    for index in chosen:
        if not -count <= index < count:
            raise UserError(f"there is no block {index} to align: the model has {count} blocks")
    return sorted({index % count for index in chosen})


class FeatureAlignment:
    """Mean loss over the chosen blocks of student and teacher, after both have run."""

    def __init__(self, kind: str, student: nn.Module, teacher: nn.Module,
                 chosen: Sequence[int] | None) -> None:
        if kind not in ALIGN:
            raise UserError(f"unknown alignment {kind!r}; choose one of {', '.join(ALIGN)}")
        self.kind = kind
        indices = [] if kind == "none" else aligned_blocks(student, chosen)
        self.features = [BlockFeatures(model, indices) for model in (student, teacher)] \
            if indices else []

    def __bool__(self) -> bool:
        return bool(self.features)

    def loss(self, generator: torch.Generator) -> Tensor:
        pairs = list(zip(*(features.take() for features in self.features), strict=True))
        losses = [self._pair_loss(student.float(), teacher.float(), generator)
                  for student, teacher in pairs]
        return torch.stack(losses).mean()

    def _pair_loss(self, student: Tensor, teacher: Tensor, generator: torch.Generator) -> Tensor:
        if self.kind == "mse":
            return mse_loss(student, teacher)
        rows = student.shape[0] * student.shape[1]
        chosen = torch.randperm(rows, generator=generator)[:RANDOM_TOKENS].to(student.device)
        return manifold_loss(student, teacher, chosen)

    def remove(self) -> None:
        for features in self.features:
            features.remove()
