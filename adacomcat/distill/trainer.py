"""The training loop: epochs of steps, searches between them, and a state to resume from."""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from adacomcat.data import Batches, LabelledImages
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.evaluation import evaluate
from adacomcat.distill.metrics import Event, Observer, Pace
from adacomcat.distill.objective import BatchMixing, Objective
from adacomcat.distill.optimizer import make_schedule, move
from adacomcat.distill.parallel import finite, load_model_, load_optimizer_, share, whole
from adacomcat.distill.state import (
    StateWriter,
    require_same_inputs,
    require_same_settings,
)
from adacomcat.errors import UserError
from adacomcat.search.published import free_attention_biases_
from adacomcat.search.search import RankSearch
from adacomcat.search.supernet import finalize, set_ranks_
from adacomcat.utils.distributed import Processes
from adacomcat.utils.model import copied
from adacomcat.utils.progress import progress
from adacomcat.utils.random import derived_generator, derived_seed
from adacomcat.utils.stopping import Stopped, asked_to_stop

LOG = logging.getLogger(__name__)

# Part of the seeds' keys: each use of random numbers has a stream of its own.
MIXUP, TOKENS, DROPOUT, SEARCH = range(101, 105)

# Where a run stands; with the weights and the optimisers' states that is all of it.
POSITION = ("epoch", "step", "searched", "loss_sum", "history", "searches", "best")


class Trainer:
    """Trains ``student`` in place: ``train`` goes from where the state stands to the last epoch.

    Every random choice is derived from (seed, epoch, step), and every step sees the same global
    batch on any number of processes, so weights, optimisers and position are the complete state.

    Args:
        student: the model; the supernet of ``search`` where ranks are searched.
        config: all settings.
        train_part: the images that weights are trained on.
        processes: the processes that train together.
        teacher: a model in eval mode without gradients, to distil from; None: labels alone.
        search: chooses ranks at the start of the epochs that its policy names.
        search_part: the images that ranks are searched on; none of them is in ``train_part``.
        inputs: name → checksum of what the run began with. A state is refused where they differ.

    Raises:
        UserError: the settings do not fit the data or the model.
    """

    def __init__(self, student: nn.Module, config: TrainConfig, train_part: LabelledImages,
                 processes: Processes, *, teacher: nn.Module | None = None,
                 search: RankSearch | None = None,
                 search_part: LabelledImages | None = None,
                 inputs: Mapping[str, str] | None = None) -> None:
        self.student, self.config, self.processes = student, config, processes
        self.inputs = dict(inputs or {})
        self.search, self.train_part, self.search_part = search, train_part, search_part
        self.steps = len(self._batches(epoch=1))
        if config.grad_accum_steps > (each := config.batch_size // processes.world_size):
            raise UserError(f"grad_accum_steps {config.grad_accum_steps} leaves a pass without an "
                            f"image: a process has {each} of a batch of {config.batch_size}")
        shards = config.parallel == "fsdp" and processes.world_size > 1
        self.ema = None
        if config.ema_decay is not None:
            # Shards and whole buffers do not go into one call.
            self.ema = ModelEmaV3(student, decay=config.ema_decay, use_warmup=True,
                                  foreach=not shards)
        self._unsharded = copied(student).cpu() if shards else None  # gets whole tensors
        others = [teacher, None if self.ema is None else self.ema.module]
        self.sharing = share(config.parallel, student, [model for model in others if model],
                             processes)
        self._renew_optimizer()
        self.objective = Objective(config, student, teacher, self.sharing.forward)
        self.mixing = BatchMixing(config, student, processes)
        self.writer = None
        if config.state_dir is not None and processes.first:
            self.writer = StateWriter(config.state_dir)
        self.epoch, self.step = 1, 0
        self.searched = False  # whether this epoch has asked the policy for a search
        self.loss_sum = 0.0  # over the steps of this epoch
        self.history: list[dict[str, Any]] = []
        self.searches: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}  # the best epoch on the test set, and its accuracy
        # Gradients of float16 are scaled into its range; a step where they overflow is left out.
        self.scaler = torch.amp.GradScaler(
            processes.device.type, enabled=config.amp and config.amp_dtype == "float16")
        self.pace = Pace(config.batch_size, config.total_epochs * self.steps)
        self.observer: Observer | None = None  # is told what happens, on the first process

    def _renew_optimizer(self) -> None:
        """An optimiser without a memory for what trains now, and the schedule of its rate."""
        config = self.config
        self.optimizer = create_optimizer_v2(self.student, opt=config.opt, lr=config.highest_lr,
                                             weight_decay=config.weight_decay,
                                             **config.optimizer_arguments)
        self.scheduler = make_schedule(self.optimizer, config, self.steps)

    def _begin_finetuning(self) -> None:
        """Train the attentions' biases again where the settings say so."""
        if self.config.finetune_attention_biases and free_attention_biases_(self.student):
            self._renew_optimizer()

    @property
    def best_model(self) -> nn.Module:
        """The model to evaluate and keep: the averaged weights where there are any."""
        if self.ema is None:
            return self.student
        if self.search is not None:
            set_ranks_(self.ema.module, self.search.plan)
        return self.ema.module

    def finished(self) -> nn.Module:
        """A copy of the best model without gates and shards, cut to the plan, in eval mode."""
        model = self.best_model
        if self._unsharded is not None:  # all processes take part
            self._unsharded.load_state_dict(whole(model.state_dict()))
            model = self._unsharded.to(self.processes.device)
            if self.search is not None:
                set_ranks_(model, self.search.plan)
        made = copied(model) if self.search is None else finalize(model, self.search.plan)
        return made.eval()

    def train(self, test_set: LabelledImages | None = None,
              on_best: Callable[[nn.Module], None] | None = None) -> None:
        """Every epoch that is left; with a test set, accuracy after each.

        Args:
            test_set: labelled images that judge every epoch.
            on_best: called in the first process with the finished model after each epoch that is
                the best so far on ``test_set``.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            UserError: the loss diverges, or a state cannot be written.
        """
        self._tell("start", epochs=self.config.total_epochs, steps=self.steps)
        while self.epoch <= self.config.total_epochs:
            start = time.perf_counter()
            if self.epoch > self.config.epochs:
                self._begin_finetuning()
            self._maybe_search()
            searched = time.perf_counter()
            self._run_epoch()
            if not finite(self.student, self.processes):
                raise UserError(f"weights are NaN or infinite after epoch {self.epoch}; a lower "
                                "lr or clip_grad, or a larger opt_eps, may mend it")
            record = {"epoch": self.epoch, "loss": self.loss_sum / self.steps,
                      "lr": self.optimizer.param_groups[0]["lr"],
                      "search_seconds": searched - start,
                      "train_seconds": time.perf_counter() - searched}
            if test_set is not None:
                found = evaluate(self.best_model, test_set, 4 * self.config.batch_size,
                                 self.processes, self.config.workers)
                record |= {"top1": found["top1"], "test_loss": found["loss"]}
                self._tell_best(record, on_best)
            self.history.append(record)
            if self.processes.first:
                _log(record, self.config.total_epochs)
            self._tell("epoch", **record)
            self.epoch, self.step, self.loss_sum = self.epoch + 1, 0, 0.0
            self.searched = False
            self.save()
        self.objective.end()
        if self.writer is not None:
            self.writer.finish()
        self._tell("end")

    def _tell(self, name: str, **event: Any) -> None:
        if self.observer is not None and self.processes.first:
            self.observer(Event(event=name, **event))

    def _tell_best(self, record: dict[str, Any],
                   on_best: Callable[[nn.Module], None] | None) -> None:
        if record["top1"] <= self.best.get("top1", -1.0):
            return
        self.best = {"epoch": record["epoch"], "top1": record["top1"]}
        if on_best is not None and (self.processes.first or self._unsharded is not None):
            found = self.finished()
            if self.processes.first:
                on_best(found)

    def _maybe_search(self) -> None:
        search, config = self.search, self.config
        if self.searched:
            return
        if (search is None or self.search_part is None or self.epoch > config.epochs
                or not search.due(self.epoch)):
            self.searched = True
            return
        batches = search_batches(self.search_part, config, self.epoch, self.processes)
        batches = progress(batches, f"epoch {self.epoch}: searching", total=config.search_steps)
        self.searches.append(search.run(batches, epoch=self.epoch, epochs=config.epochs,
                                        seed=config.seed + SEARCH, processes=self.processes,
                                        after_step=self._after_step))
        if config.new_optimizer:
            self._renew_optimizer()
        if self.processes.first:
            _log_search(self.searches[-1])
        self._tell("search", **self.searches[-1])
        self.searched = True

    def _batches(self, epoch: int, start_step: int = 0) -> Batches:
        config, processes = self.config, self.processes
        return Batches(self.train_part, config.batch_size, shuffle=True, seed=config.seed,
                       epoch=epoch, rank=processes.rank, world_size=processes.world_size,
                       augment=config.augment, repeats=config.repeated_aug, start_step=start_step,
                       num_workers=config.workers, steps=config.steps)

    def _run_epoch(self) -> None:
        self.student.train()
        batches = self._batches(self.epoch, self.step)
        bar = progress(batches, f"epoch {self.epoch}", total=len(batches))
        for images, labels in self.pace.watched(bar):
            loss = self._train_step(images, labels)
            self.loss_sum += loss
            self.step += 1
            done = (self.epoch - 1) * self.steps + self.step
            self._tell("step", epoch=self.epoch, step=self.step, at=done, loss=loss,
                       **self.pace.report(done))
            self.processes.reached(self._where())
            if self.step < self.steps:  # the end of an epoch saves, too
                self._after_step()

    def _train_step(self, images: Tensor, labels: Tensor) -> float:
        """One update of the weights; the loss, a mean over all processes."""
        update, device = (self.epoch - 1) * self.steps + self.step, self.processes.device
        move(self.scheduler, self.config, self.epoch, update)
        images, targets = self.mixing.mix(images.to(device), labels.to(device), self._key(MIXUP))
        # Each process drops other activations.
        torch.manual_seed(derived_seed(*self._key(DROPOUT), self.processes.rank))
        self.optimizer.zero_grad()
        passes = self.config.grad_accum_steps
        loss = torch.zeros((), device=device)
        for part in zip(images.tensor_split(passes), targets.tensor_split(passes), strict=True):
            loss += self._pass(*part)
        self._update_weights()
        if self.ema is not None:
            self.ema.update(self.student, step=update + 1)
        mean = self.processes.mean(loss)
        if not mean < float("inf"):
            raise UserError(f"the loss is {mean} at epoch {self.epoch}, step {self.step}; "
                            "a lower lr or clip_grad may mend it")
        return mean

    def _pass(self, images: Tensor, targets: Tensor) -> Tensor:
        """Adds gradients; the loss, whose sums have the loss of the global batch as their mean."""
        processes, device = self.processes, self.processes.device
        part = processes.share(len(images), self.config.batch_size)
        dtype = getattr(torch, self.config.amp_dtype)

        def mean(means: Tensor) -> Tensor:
            shares = processes.sum(means.new_full((), part))
            return processes.sum(means * part) / shares
        with (torch.autocast(device.type, dtype, enabled=self.config.amp),
              self.sharing.passes()):
            loss = part * self.objective.loss(images, targets, self.epoch,
                                              derived_generator(*self._key(TOKENS)), mean)
        with self.sharing.passes():
            self.scaler.scale(loss).backward()
        return loss.detach()

    def _update_weights(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.sharing.average_gradients_(parameters)
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(parameters, self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _key(self, stream: int) -> tuple[int, ...]:
        return (self.config.seed, stream, self.epoch, self.step)

    def _where(self) -> str:
        return f"epoch {self.epoch}, step {self.step}"

    def _after_step(self) -> None:
        """Save where it is time, and end where a signal asks for it."""
        asked, every = asked_to_stop(), self.config.checkpoint_steps
        if self.processes.any(asked is not None):
            self.save()
            if self.writer is not None:
                self.writer.finish()
            raise Stopped(asked or signal.SIGTERM, self._where())
        due = self.writer is not None and self.writer.is_due(self.config.checkpoint_seconds)
        if self._unsharded is not None:  # all take part in saving
            due = self.processes.any(due)
        if due or (every and self.step and self.step % every == 0):
            self.save()

    def save(self) -> None:
        """Hand the state to the thread that writes it, where the settings name a folder for it."""
        if self.config.state_dir is None or not (self.writer or self._unsharded):
            return
        state = self.state_dict()
        if self.writer is not None:
            self.writer.write(state)

    def state_dict(self) -> dict[str, Any]:
        """Settings, weights, optimisers and position; shards are gathered from every process."""
        return {"config": self.config.identity(), "inputs": self.inputs,
                "student": whole(self.student.state_dict()),
                "optimizer": whole(self.optimizer.state_dict()),
                "scaler": self.scaler.state_dict(),
                "ema": None if self.ema is None else whole(self.ema.module.state_dict()),
                "search": None if self.search is None else self.search.state_dict(),
                **{name: getattr(self, name) for name in POSITION}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            UserError: it was made with other settings or is of another model.
        """
        try:
            require_same_settings(self.config.identity(), state["config"])
            require_same_inputs(self.inputs, state["inputs"])
            self._load(state)
        except UserError:
            raise
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"the training state is of another model or version ({error}); remove "
                            "it and begin anew") from error

    def _load(self, state: dict[str, Any]) -> None:
        if state["epoch"] > self.config.epochs:
            self._begin_finetuning()
        load_model_(self.student, state["student"])
        load_optimizer_(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            load_model_(self.ema.module, state["ema"])
        if self.search is not None:
            self.search.load_state_dict(state["search"])
        for name in POSITION:
            setattr(self, name, state[name])


def search_batches(part: LabelledImages, config: TrainConfig, epoch: int,
                   processes: Processes) -> Iterator[tuple[Tensor, Tensor]]:
    """``config.search_steps`` shuffled batches of ``part``, which is begun anew when it ends.

    Without a number of steps: all images once, those of the validation in their order.
    """
    size = config.search_batch_size or config.batch_size
    if config.search_steps is None:
        whole = len(part) // processes.world_size * processes.world_size  # none gets no image
        yield from Batches(part.subset(torch.arange(whole)), size, shuffle=False, seed=config.seed,
                           epoch=epoch, rank=processes.rank, world_size=processes.world_size,
                           num_workers=config.workers)
        return
    if size > len(part):  # a power of two: the same on one process and on several
        size = 1 << (len(part).bit_length() - 1)
    left, turn = config.search_steps, 0
    while left:
        for batch in Batches(part, size, shuffle=True,
                             seed=derived_seed(config.seed, SEARCH, turn), epoch=epoch,
                             rank=processes.rank, world_size=processes.world_size,
                             num_workers=config.workers):
            if not left:
                return
            yield batch
            left -= 1
        turn += 1


def _log(record: dict[str, Any], epochs: int) -> None:
    top1 = f", top-1 {record['top1']:.2f} %" if "top1" in record else ""
    seconds = record["search_seconds"] + record["train_seconds"]
    LOG.info("epoch %d of %d: loss %.4f%s, %.0f s", record["epoch"], epochs, record["loss"], top1,
             seconds)


def _log_search(record: dict[str, Any]) -> None:
    LOG.info("epoch %d: search at τ %.3g, F %.3g: %d ranks changed, %s parameters%s, %.1f s",
             record["epoch"], record["temperature"], record["frequency"], record["changed"],
             f"{record['params']:,}", "; the old plan is better" if record["rejected"] else "",
             record["seconds"])
