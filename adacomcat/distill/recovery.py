"""Recovery: a compressed model learns the dense model's features, on images without labels.

    loss = ρ(final tokens) + |s - t|² / |t|² of the head's outputs + w · mean over blocks of ρ
    ρ(s, t) = |s - t|² / |t - mean t|²

s is the student's tensor, t the teacher's. ρ is 1 for a student that always gives the mean.
"""

import copy
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from adacomcat.convert.calibrate import BATCH
from adacomcat.convert.quantized import require_not_quantized
from adacomcat.distill.losses import BlockFeatures, aligned_blocks, mse_loss, relative_error
from adacomcat.distill.optimizer import require_optimizer
from adacomcat.distill.teacher import require_teacher
from adacomcat.errors import UserError
from adacomcat.utils.limits import RECOVERY, require, require_kinds
from adacomcat.utils.model import tokens_and_outputs
from adacomcat.utils.progress import progress

SCHEDULE = 10_000  # steps of the learning rate's schedule, over the whole recovery


@dataclass(frozen=True)
class RecoveryConfig:
    """Settings of ``recover``, which ends after ``minutes``, or after ``steps`` where given.

    Args:
        minutes: of training.
        steps: a number of steps instead of minutes.
        opt: timm's name of an optimiser.
        lr: the highest learning rate; it falls to a hundredth of it along a cosine.
        weight_decay: the optimiser's.
        warmup: share of the recovery in which the learning rate rises from lr / 100 to lr.
        block_weight: weight of the blocks' features beside the final tokens.
        clip_grad: the largest norm of the gradient; 0 or None: any.
        ema_decay: decay of the averaged weights, which are then kept; None: no average.
        amp: bfloat16 autocast.
        seed: for the images, where the caller draws them.
    """

    minutes: float = 15.0
    steps: int | None = None
    opt: str = "adamw"
    lr: float = 3e-5
    weight_decay: float = 0.0
    warmup: float = 0.02
    block_weight: float = 0.5
    clip_grad: float | None = 1.0
    ema_decay: float | None = None
    amp: bool = False
    seed: int = 0

    def checked(self) -> "RecoveryConfig":
        """These settings.

        Raises:
            UserError: a value is wrong; the message names it.
        """
        require(self, RECOVERY, optional=("steps", "clip_grad", "ema_decay"))
        require_kinds(self, opt=str, amp=bool)
        require_optimizer(self.opt)
        return self

    def with_(self, **changes: Any) -> "RecoveryConfig":
        """A checked copy with other values."""
        return replace(self, **changes).checked()


def recover(student: nn.Module, teacher: nn.Module, batches: Iterable,
            config: RecoveryConfig | None = None) -> nn.Module:
    """A copy of ``student`` whose matrices learned the teacher's features; its plan stays.

    Only parameters of two dimensions are trained. Norms, layer scales, biases and embeddings stay:
    with them the features' error was higher, at each learning rate that was tried
    (examples/dinov2/RESULTS.md).

    Args:
        student: the compressed model.
        teacher: the dense model, on the same device.
        batches: images (N, C, H, W) as the models see them, or tuples that start with them; an
            iterable that can be gone through again, since it is begun anew when it ends.
        config: the settings; None: all defaults.

    Returns:
        A model in eval mode whose parameters all require gradients.

    Raises:
        UserError: there are no images, a setting is wrong, the teacher is of another shape, or the
            gradient is not finite.
    """
    config = (RecoveryConfig() if config is None else config).checked()
    require_not_quantized(student, "recover")
    require_teacher(student, teacher, tokens_and_outputs)
    blocks = [len(getattr(model, "blocks", ())) for model in (teacher, student)]
    if blocks[0] != blocks[1]:
        raise UserError(f"the teacher has {blocks[0]} blocks and the model {blocks[1]}; recover "
                        "learns from the dense model that was compressed")
    student = copy.deepcopy(student).train()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.ndim == 2)
    teacher = copy.deepcopy(teacher).requires_grad_(False).eval()
    _Recovery(student, teacher, config).run(_endless(batches))
    return student.requires_grad_(True).eval()


def _endless(batches: Iterable) -> Iterator[Tensor]:
    for turn in itertools.count():
        empty = True
        for batch in batches:
            empty = False
            yield batch[0] if isinstance(batch, list | tuple) else batch
        if empty:
            raise UserError("recovery got no images" if turn == 0 else
                            "the batches of images ended; give recovery an iterable that can be "
                            "gone through again, like a list or a DataLoader")


class _Recovery:
    """One run: trains those parameters of ``student``, in place, that require gradients."""

    def __init__(self, student: nn.Module, teacher: nn.Module, config: RecoveryConfig) -> None:
        self.student, self.teacher, self.config = student, teacher, config
        indices = aligned_blocks(student, range(len(getattr(student, "blocks", ()))))
        self.features = [BlockFeatures(model, indices) for model in (student, teacher)]
        self.matrices = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = create_optimizer_v2(self.matrices, opt=config.opt, lr=config.lr,
                                             weight_decay=config.weight_decay)
        self.scheduler = CosineLRScheduler(
            self.optimizer, t_initial=SCHEDULE, warmup_t=int(config.warmup * SCHEDULE),
            warmup_lr_init=config.lr / 100, lr_min=config.lr / 100, t_in_epochs=False)
        self.ema = None
        if config.ema_decay is not None:
            self.ema = ModelEmaV3(student, decay=config.ema_decay, use_warmup=True)

    def run(self, batches: Iterator[Tensor]) -> None:
        device = next(self.student.parameters()).device
        shares = progress(self._shares(), "recovering", total=self.config.steps)
        for step, done in enumerate(shares):
            self.scheduler.step_update(int(done * SCHEDULE))
            self._step(next(batches).to(device), step)
        for features in self.features:
            features.remove()
        if self.ema is not None:
            self.student.load_state_dict(self.ema.module.state_dict())

    def _shares(self) -> Iterator[float]:
        """Before every step: the share of the recovery that is done, from 0 to 1."""
        if self.config.steps is not None:
            yield from (step / self.config.steps for step in range(self.config.steps))
            return
        start, limit = time.perf_counter(), 60 * self.config.minutes
        while (done := (time.perf_counter() - start) / limit) < 1:
            yield done

    def _step(self, images: Tensor, step: int) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.amp):
            loss = self._loss(images)
        self.optimizer.zero_grad()
        loss.backward()
        limit = self.config.clip_grad or math.inf  # 0 is off, as in timm
        norm = nn.utils.clip_grad_norm_(self.matrices, limit)
        if not norm.isfinite():
            raise UserError(f"the gradient is {norm.item()} at step {step}; a lower lr may mend it")
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.student, step=step + 1)

    def _loss(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = tokens_and_outputs(self.teacher, images)
        found = tokens_and_outputs(self.student, images)
        # ρ would divide the head's outputs by their spread over images, which is 0 for one image.
        loss = relative_error(found[0], wanted[0]) + sum(map(mse_loss, found[1:], wanted[1:]))
        students, teachers = (features.take() for features in self.features)
        blocks = [relative_error(s, t) for s, t in zip(students, teachers, strict=True)]
        return loss + self.config.block_weight * sum(blocks) / max(1, len(blocks))


@torch.inference_mode()
def feature_error(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """ρ of the final tokens over all images: 0 is exact, 1 no better than the mean token.

    Args:
        student: the compressed model.
        teacher: the dense model, on the same device.
        images: (N, C, H, W), as the models see them.
    """
    def tokens(model: nn.Module) -> Tensor:
        return torch.cat([tokens_and_outputs(model, batch)[0] for batch in images.split(BATCH)])

    return relative_error(tokens(student), tokens(teacher)).item()
