"""Recovery: a compressed model learns the dense model's features, on images without labels.

loss = ρ(tokens) + |s - t|² / |t|² (the head's outputs) + w · mean over blocks of ρ(its stream),
ρ(s, t) = |s - t|² / |t - mean t|² of student s and teacher t, so 1 is no better than the mean.
"""

import copy
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from adacomcat.convert.calibrate import BATCH
from adacomcat.distill.losses import BlockFeatures, aligned_blocks, mse_loss, relative_error
from adacomcat.errors import UserError
from adacomcat.utils.model import tokens_and_outputs
from adacomcat.utils.progress import progress

SCHEDULE = 10_000  # the learning rate follows the part done, in this many steps


@dataclass(frozen=True)
class RecoveryConfig:
    """Ends after ``minutes`` of training, or after ``steps`` where they are given."""

    minutes: float = 15.0
    steps: int | None = None
    opt: str = "adamw"
    lr: float = 3e-5
    weight_decay: float = 0.0
    warmup: float = 0.02  # part of the whole
    block_weight: float = 0.5
    clip_grad: float = 1.0
    ema_decay: float | None = None
    amp: bool = False  # bfloat16 autocast
    seed: int = 0

    def checked(self) -> "RecoveryConfig":
        if self.steps is None and not self.minutes > 0:
            raise UserError(f"recovery needs some minutes; got {self.minutes}")
        if self.steps is not None and self.steps < 0:
            raise UserError(f"steps must not be negative; got {self.steps}")
        return self

    def with_(self, **changes: object) -> "RecoveryConfig":
        return replace(self, **changes).checked()


def recover(student: nn.Module, teacher: nn.Module, batches: Iterable,
            config: RecoveryConfig | None = None) -> nn.Module:
    """A copy of ``student`` whose matrices are trained; its shapes, and so its plan, stay.

    Norms, layer scales, biases and embeddings are the teacher's and stay: moved as fast as matrices
    they cost more than is won (examples/dinov2).

    batches: images (N, C, H, W) as the models see them, or tuples that start with them; begun anew
    when they end.
    """
    config = (config or RecoveryConfig()).checked()
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
        for step, part in enumerate(progress(self._parts(), "recovering",
                                             total=self.config.steps)):
            self.scheduler.step_update(int(part * SCHEDULE))
            self._step(next(batches).to(device), step)
        for features in self.features:
            features.remove()
        if self.ema is not None:
            self.student.load_state_dict(self.ema.module.state_dict())

    def _parts(self) -> Iterator[float]:
        """The part of the training that is done, before every step."""
        if self.config.steps is not None:
            yield from (step / self.config.steps for step in range(self.config.steps))
            return
        start, limit = time.perf_counter(), 60 * self.config.minutes
        while (part := (time.perf_counter() - start) / limit) < 1:
            yield part

    def _step(self, images: Tensor, step: int) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.amp):
            loss = self._loss(images)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.matrices, self.config.clip_grad)
        if not norm.isfinite():
            raise UserError(f"the gradient is {norm.item()} at step {step}; a lower lr may mend it")
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.student, step=step + 1)

    def _loss(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = tokens_and_outputs(self.teacher, images)
        found = tokens_and_outputs(self.student, images)
        # The head of few images has no spread to speak of.
        loss = relative_error(found[0], wanted[0]) + sum(map(mse_loss, found[1:], wanted[1:]))
        ours, theirs = (features.take() for features in self.features)
        blocks = [relative_error(s, t) for s, t in zip(ours, theirs, strict=True)]
        return loss + self.config.block_weight * sum(blocks) / max(1, len(blocks))


@torch.inference_mode()
def feature_error(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """ρ of the tokens, over all images."""
    def tokens(model: nn.Module) -> Tensor:
        return torch.cat([tokens_and_outputs(model, batch)[0] for batch in images.split(BATCH)])

    return relative_error(tokens(student), tokens(teacher)).item()
