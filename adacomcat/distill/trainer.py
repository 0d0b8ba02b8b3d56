"""The training loop: steps, epochs, searches between them, and a state that can go on anywhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch import Tensor, nn

from adacomcat import data
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.losses import FeatureAlignment, alignment_decay, distillation_loss
from adacomcat.distill.state import save_state
from adacomcat.errors import UserError
from adacomcat.search.search import RankSearch
from adacomcat.search.supernet import set_ranks_
from adacomcat.utils.distributed import Processes
from adacomcat.utils.progress import progress
from adacomcat.utils.random import derived_generator, derived_seed, numpy_seeded

LOG = logging.getLogger(__name__)

# Streams of random numbers that must not be each other's.
MIXUP, TOKENS, DROPOUT, SEARCH = range(101, 105)


@torch.inference_mode()
def evaluate(model: nn.Module, dataset: Any, batch_size: int, processes: Processes,
             workers: int = 0) -> dict[str, float]:
    """Top-1 in percent and mean cross-entropy over ``dataset``, shared by all processes."""
    training = model.training
    model.eval()
    top1, loss = AverageMeter(), AverageMeter()
    batches = data.loader(dataset, batch_size, shuffle=False, seed=0, epoch=0,
                          rank=processes.rank, world_size=processes.world_size,
                          num_workers=workers)
    for images, labels in progress(batches, "evaluating"):
        if not len(labels):
            continue
        images, labels = images.to(processes.device), labels.to(processes.device)
        logits = model(images).float()
        top1.update(accuracy(logits, labels)[0].item(), len(labels))
        loss.update(F.cross_entropy(logits, labels).item(), len(labels))
    sums = torch.tensor([top1.sum, loss.sum, top1.count], dtype=torch.float64,
                        device=processes.device)
    right, total, count = processes.sum(sums).tolist()
    model.train(training)
    return {"top1": right / count, "loss": total / count, "images": int(count)}


class Trainer:
    """Trains ``student`` (a supernet where ``search`` is given) on ``train_part``.

    Every random choice is derived from (seed, epoch, step), and every step sees the same global
    batch on any number of processes: a state of weights, optimisers and position is complete.
    """

    def __init__(self, student: nn.Module, config: TrainConfig, train_part: Any,
                 processes: Processes, *, teacher: nn.Module | None = None,
                 search: RankSearch | None = None, search_part: Any = None) -> None:
        self.student, self.config, self.processes = student, config, processes
        self.teacher, self.search = teacher, search
        self.train_part, self.search_part = train_part, search_part
        self.steps = len(self._batches(epoch=1))
        self.optimizer = create_optimizer_v2(student, opt=config.opt, lr=config.lr,
                                             weight_decay=config.weight_decay)
        self.scheduler = create_scheduler_v2(
            self.optimizer, config.sched, num_epochs=max(1, config.total_epochs),
            warmup_epochs=config.warmup_epochs, warmup_lr=config.warmup_lr, warmup_prefix=True,
            min_lr=config.min_lr, step_on_epochs=False, updates_per_epoch=self.steps)[0]
        self.ema = None
        if config.ema_decay is not None:
            self.ema = ModelEmaV3(student, decay=config.ema_decay, use_warmup=True)
        self.alignment = None
        if teacher is not None:
            self.alignment = FeatureAlignment(config.align, student, teacher, config.align_blocks)
        self.mixup = self._make_mixup()
        self.epoch, self.step = 1, 0
        self.searched = False  # in the epoch under way
        self.loss_sum = 0.0
        self.history: list[dict[str, Any]] = []
        self.searches: list[dict[str, Any]] = []

    def _make_mixup(self) -> Mixup | None:
        if not (self.config.mixup or self.config.cutmix):
            return None
        if self.config.batch_size % 2:
            raise UserError(f"mixup needs an even batch size; got {self.config.batch_size}")
        return Mixup(self.config.mixup, self.config.cutmix,
                     label_smoothing=self.config.smoothing, num_classes=self.student.num_classes)

    def _batches(self, epoch: int, start_step: int = 0) -> data.Batches:
        return data.loader(self.train_part, self.config.batch_size, shuffle=True,
                           seed=self.config.seed, epoch=epoch, rank=self.processes.rank,
                           world_size=self.processes.world_size, augment=self.config.augment,
                           start_step=start_step, num_workers=self.config.workers,
                           steps=self.config.steps)

    @property
    def best_model(self) -> nn.Module:
        """What is evaluated and kept: the averaged weights where there are any."""
        if self.ema is None:
            return self.student
        if self.search is not None:
            set_ranks_(self.ema.module, self.search.plan)
        return self.ema.module

    def train(self, test_set: Any = None) -> None:
        """From where the state stands to the last epoch."""
        while self.epoch <= self.config.total_epochs:
            start = time.perf_counter()
            self._maybe_search()
            trained = time.perf_counter()
            self._run_epoch()
            record = {"epoch": self.epoch, "loss": self.loss_sum / self.steps,
                      "lr": self.optimizer.param_groups[0]["lr"],
                      "search_seconds": trained - start,
                      "train_seconds": time.perf_counter() - trained}
            if test_set is not None:
                found = evaluate(self.best_model, test_set, 4 * self.config.batch_size,
                                 self.processes, self.config.workers)
                record |= {"top1": found["top1"], "test_loss": found["loss"]}
            self.history.append(record)
            self._tell(record)
            self.epoch, self.step, self.loss_sum = self.epoch + 1, 0, 0.0
            self.searched = False
            self.save()

    def _tell(self, record: dict[str, Any]) -> None:
        if self.processes.first:
            top1 = f", top-1 {record['top1']:.2f} %" if "top1" in record else ""
            seconds = record["search_seconds"] + record["train_seconds"]
            LOG.info("epoch %d of %d: loss %.4f%s, %.0f s", record["epoch"],
                     self.config.total_epochs, record["loss"], top1, seconds)

    def _maybe_search(self) -> None:
        search, config = self.search, self.config
        due = (search is not None and not self.searched and self.epoch <= config.epochs
               and search.policy.due(self.epoch))
        self.searched = True
        if not due:
            return
        batches = progress(self._search_batches(), f"epoch {self.epoch}: searching",
                           total=config.search_steps)
        self.searches.append(search.run(batches, epoch=self.epoch, epochs=config.epochs,
                                        seed=config.seed + SEARCH, processes=self.processes))

    def _search_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """``search_steps`` shuffled batches of the held-out part of the training images."""
        config, processes = self.config, self.processes
        size, held_out = config.batch_size, len(self.search_part)
        if size > held_out:  # a power of two: the same on one process and on several
            size = 1 << (held_out.bit_length() - 1)
        left, turn = config.search_steps, 0
        while left:
            for batch in data.loader(self.search_part, size, shuffle=True,
                                     seed=derived_seed(config.seed, SEARCH, turn),
                                     epoch=self.epoch, rank=processes.rank,
                                     world_size=processes.world_size,
                                     num_workers=config.workers):
                if not left:
                    return
                yield batch
                left -= 1
            turn += 1

    def _run_epoch(self) -> None:
        self.student.train()
        batches = self._batches(self.epoch, self.step)
        every = self.config.checkpoint_steps
        for images, labels in progress(batches, f"epoch {self.epoch}", total=len(batches)):
            self.loss_sum += self._train_step(images, labels)
            self.step += 1
            if every and self.step % every == 0 and self.step < self.steps:
                self.save()

    def _train_step(self, images: Tensor, labels: Tensor) -> float:
        update = (self.epoch - 1) * self.steps + self.step
        self.scheduler.step_update(update)
        images, targets = self._targets(images.to(self.processes.device),
                                        labels.to(self.processes.device))
        # Dropout is each process's own.
        torch.manual_seed(derived_seed(*self._key(DROPOUT), self.processes.rank))
        with self._autocast():
            loss = self._loss(images, targets)
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.processes.average_gradients_(parameters)
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(parameters, self.config.clip_grad)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.student, step=update + 1)
        mean = self.processes.mean(loss)
        if not mean < float("inf"):
            raise UserError(f"the loss is {mean} at epoch {self.epoch}, step {self.step}; "
                            "a lower lr or clip_grad may mend it")
        return mean

    def _key(self, stream: int) -> tuple[int, ...]:
        return (self.config.seed, stream, self.epoch, self.step)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.config.amp):
            yield

    def _targets(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup pairs images of the whole global batch, so that shards change nothing."""
        if self.mixup is None:
            return images, labels
        images = self.processes.gather_interleaved(images)
        labels = self.processes.gather_interleaved(labels)
        with numpy_seeded(*self._key(MIXUP)):
            images, targets = self.mixup(images.clone(), labels)
        return self.processes.shard(images), self.processes.shard(targets)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """(1 - a) CE + a KD + w cos(π/2 · …) alignment."""
        config = self.config
        smoothing = config.smoothing if self.mixup is None else 0.0
        logits = self.student(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        if config.kd != "none":
            distilled = distillation_loss(config.kd, logits.float(), teacher_logits.float(),
                                          config.kd_temperature)
            loss = (1 - config.kd_alpha) * loss + config.kd_alpha * distilled
        if self.alignment:
            weight = config.align_weight * alignment_decay(self.epoch, config.total_epochs)
            loss = loss + weight * self.alignment.loss(derived_generator(*self._key(TOKENS)))
        return loss

    def save(self) -> None:
        if self.config.state_dir is not None and self.processes.first:
            save_state(self.config.state_dir, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config.identity(), "student": self.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "search": None if self.search is None else self.search.state_dict(),
                "epoch": self.epoch, "step": self.step, "searched": self.searched,
                "loss_sum": self.loss_sum, "history": self.history, "searches": self.searches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ours, theirs = self.config.identity(), state["config"]
        differing = sorted(name for name in ours if ours[name] != theirs.get(name))
        if differing:
            raise UserError("cannot resume: the training state was made with other settings for "
                            + ", ".join(f"{name} ({theirs.get(name)!r}, now {ours[name]!r})"
                                        for name in differing))
        try:
            self.student.load_state_dict(state["student"])
        except RuntimeError as error:
            raise UserError(f"the training state is of another model: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.search is not None:
            self.search.load_state_dict(state["search"])
        for name in ("epoch", "step", "searched", "loss_sum", "history", "searches"):
            setattr(self, name, state[name])
