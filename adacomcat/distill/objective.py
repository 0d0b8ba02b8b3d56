"""The loss of one training step, and the mixed images and labels that it is taken on."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from adacomcat.distill.config import TrainConfig
from adacomcat.distill.losses import (
    FeatureAlignment,
    alignment_decay,
    distillation_loss,
    running_weight,
)
from adacomcat.distill.teacher import require_teacher
from adacomcat.errors import UserError
from adacomcat.utils.distributed import Processes
from adacomcat.utils.random import numpy_seeded


class Objective:
    """(1 - a) CE + a KD + w cos(π/2 · (epoch - 1) / epochs) alignment; without a teacher CE.

    a is ``config.kd_alpha``, w ``config.align_weight``. ComCAT's alignment has ``running_weight``
    instead, over the epochs that search. Hooks on both models keep the features that
    are aligned, so copies of the student are made before this.
    """

    def __init__(self, config: TrainConfig, student: nn.Module, teacher: nn.Module | None) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        self.alignment = None
        if teacher is not None:
            self.alignment = FeatureAlignment(config.align, student, teacher, config.align_blocks)
            require_teacher(student, teacher, _outputs if config.kd != "none" else _nothing)
            self.alignment.require_alike()

    def loss(self, images: Tensor, targets: Tensor, epoch: int,
             generator: torch.Generator) -> Tensor:
        """A scalar.

        Args:
            images: (n, C, H, W).
            targets: labels (n,), or probabilities (n, classes) where images are mixed.
            epoch: counted from 1.
            generator: draws the tokens that the manifold loss compares.
        """
        config = self.config
        smoothing = 0.0 if config.mixes_images else config.smoothing
        logits = self.student(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        if config.kd != "none":
            distilled = distillation_loss(config.kd, logits.float(), teacher_logits.float(),
                                          config.kd_temperature, config.kd_reduction)
            loss = (1 - config.kd_alpha) * loss + config.kd_alpha * distilled
        if self.alignment:
            loss = loss + self._alignment_weight(epoch) * self.alignment.loss(generator)
        return loss

    def _alignment_weight(self, epoch: int) -> float:
        config = self.config
        if config.align == "comcat":
            searching = config.epochs if config.keep_params is not None else 0
            return running_weight(config.align_weight, epoch, searching)
        return config.align_weight * alignment_decay(epoch, config.total_epochs)


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    return [model(images)]


def _nothing(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Nothing to compare; the hooks on both models see the images all the same."""
    model(images)
    return []


class BatchMixing:
    """timm's Mixup and CutMix over the global batch, so that shards change nothing."""

    def __init__(self, config: TrainConfig, model: nn.Module, processes: Processes) -> None:
        self.processes, self.mixup = processes, None
        if not config.mixes_images:
            return
        if config.batch_size % 2:
            raise UserError(f"mixup needs an even batch size; got {config.batch_size}")
        num_classes: Any = model.num_classes
        self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing,
                           num_classes=num_classes)

    def mix(self, images: Tensor, labels: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mixed images and probabilities (n, classes), drawn from the seed ``key``.

        Without mixup and cutmix: the images and labels themselves.
        """
        if self.mixup is None:
            return images, labels
        images = self.processes.gather_interleaved(images)
        labels = self.processes.gather_interleaved(labels)
        with numpy_seeded(*key):
            images, targets = self.mixup(images.clone(), labels)
        return self.processes.shard(images), self.processes.shard(targets)
