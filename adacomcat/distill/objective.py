"""The loss of one training step, and the mixed images and labels that it is taken on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
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
from adacomcat.utils.model import input_size
from adacomcat.utils.random import numpy_seeded


class Objective:
    """(1 - a) CE + a KD + w cos(π/2 · (epoch - 1) / epochs) alignment; without a teacher CE.

    a is ``config.kd_alpha``, w ``config.align_weight``. ComCAT's alignment has ``running_weight``
    instead, over the epochs that search. Hooks on both models keep the features that are aligned,
    so copies of the student are made before this. Where the student has a distillation token, KD is
    of its output and CE of the class token's.
    """

    def __init__(self, config: TrainConfig, student: nn.Module, teacher: nn.Module | None,
                 forward: nn.Module | None = None) -> None:
        """forward: what is called in the student's place, where several processes share it."""
        self.config, self.student, self.teacher = config, student, teacher
        self.forward = student if forward is None else forward
        self.alignment = None
        if teacher is not None:
            self.alignment = FeatureAlignment(config.align, student, teacher, config.align_blocks)
            require_teacher(student, teacher, _outputs if config.kd != "none" else _nothing)
            self.alignment.require_alike()
            distilled: Any = getattr(student, "set_distilled_training", None)
            if config.kd != "none" and distilled is not None:
                distilled(True)  # in training the student gives both outputs

    def end(self) -> None:
        """Leave the student as it was: without hooks, and with one output in training."""
        if self.alignment is not None:
            self.alignment.remove()
        distilled: Any = getattr(self.student, "set_distilled_training", None)
        if distilled is not None:
            distilled(False)

    def loss(self, images: Tensor, targets: Tensor, epoch: int, generator: torch.Generator,
             mean: Callable[[Tensor], Tensor] = lambda values: values) -> Tensor:
        """A scalar, over these images.

        Args:
            images: (n, C, H, W).
            targets: labels (n,), or probabilities (n, classes) where images are mixed.
            epoch: counted from 1.
            generator: draws the tokens that the manifold loss compares.
            mean: means over these images → means over the images of all processes.
        """
        config = self.config
        outputs = self.forward(images)
        logits, token = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        loss = _label_loss(config, logits.float(), targets)
        if self.teacher is None or (config.kd == "none" and not self.alignment):
            return loss
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        if config.kd != "none":
            distilled = distillation_loss(config.kd, token.float(), teacher_logits.float(),
                                          config.kd_temperature, config.kd_reduction)
            loss = (1 - config.kd_alpha) * loss + config.kd_alpha * distilled
        if self.alignment:
            loss = loss + self._alignment_weight(epoch) * self.alignment.loss(generator, mean)
        return loss

    def _alignment_weight(self, epoch: int) -> float:
        config = self.config
        if config.align == "comcat":
            searching = config.epochs if config.keep_params is not None else 0
            return running_weight(config.align_weight, epoch, searching)
        return config.align_weight * alignment_decay(epoch, config.total_epochs)


def _label_loss(config: TrainConfig, logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of ``logits`` (n, classes) that the settings ask for."""
    if not config.bce_loss:
        smoothing = 0.0 if config.mixes_images else config.smoothing
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    return BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)(logits, targets)


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    return [model(images)]


def _nothing(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Nothing to compare; the hooks on both models see the images all the same."""
    model(images)
    return []


def _require_boxes(shares: tuple[float, ...], size: tuple[int, int, int]) -> None:
    """Raise a ``UserError`` unless timm finds a side of whole pixels between the two shares."""
    least, most = shares
    if any(int(side * least) >= int(side * most) for side in size[1:]):
        raise UserError(f"cutmix_minmax {least:g} to {most:g} leaves no side of a box in images of "
                        f"{size[1]} x {size[2]} pixels: take a wider range")


class BatchMixing:
    """timm's Mixup and CutMix over the global batch, so that shards change nothing.

    timm mixes an image with the one at its place from the end. Behind its own images a process
    puts those partners, so that each has its own there.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, processes: Processes) -> None:
        self.processes, self.mixup, self.batch_size = processes, None, config.batch_size
        if not config.mixes_images:
            return
        if config.batch_size % 2:
            raise UserError(f"mixup needs an even batch size; got {config.batch_size}")
        if config.mixup_mode != "batch" and processes.world_size > 1:
            raise UserError(f"mixup_mode {config.mixup_mode} draws for the images of one process: "
                            "take batch, or run one process")
        if config.cutmix_minmax is not None:
            _require_boxes(config.cutmix_minmax, input_size(model))
        num_classes: Any = model.num_classes
        self.mixup = Mixup(config.mixup, config.cutmix, config.cutmix_minmax, config.mixup_prob,
                           config.mixup_switch_prob, config.mixup_mode,
                           label_smoothing=config.smoothing, num_classes=num_classes)

    def mix(self, images: Tensor, labels: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mixed images and probabilities (n, classes), drawn from the seed ``key``.

        Without mixup and cutmix: the images and labels themselves.
        """
        if self.mixup is None:
            return images, labels
        own, partners = len(labels), self.processes.mirrored
        if self.processes.world_size > 1:
            images = torch.cat([images, partners(images, self.batch_size)])
            labels = torch.cat([labels, partners(labels, self.batch_size)])
        with numpy_seeded(*key):
            images, targets = self.mixup(images.clone(), labels)
        return images[:own], targets[:own]
