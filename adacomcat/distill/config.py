"""The settings of a training run: all that decides it beside the model and the data."""

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from adacomcat.errors import UserError, reason
from adacomcat.search.search import SearchConfig
from adacomcat.utils.distributed import TIMEOUT
from adacomcat.utils.limits import CHOICES, TRAINING, require, require_kinds

MLP = CHOICES["mlp"]

# The preset 'comcat' holds what ComCAT's published code does differently: plain SVD without the
# attentions' biases, uniform ranks at the start, a search in every epoch with τ annealed over the
# search, hard distillation, no aligned blocks.
PRESETS: dict[str, dict[str, Any]] = {
    "adacomcat": {},
    "comcat": {"search": "every", "kd": "hard", "align": "none", "calibration_images": 0,
               "drop_attention_biases": True, "start_from_allocation": False, "tau_per": "search",
               "confirm_plans": False, "mlp": "ranks"},
}


@dataclass(frozen=True)
class TrainConfig:
    """The settings of ``train.run``; ``preset``, ``checked`` and ``with_`` refuse wrong values.

    Epochs count from 1. The first ``epochs`` search ranks and train; ``finetune_epochs`` more train
    at the ranks found. One schedule of the learning rate spans both.

    Args:
        epochs: epochs with searches; 0 compresses without training.
        finetune_epochs: epochs after them, without a search.
        steps: end every epoch after this many steps; None: after all images.
        batch_size: images of a step, over all processes.
        opt: timm's name of an optimiser.
        lr: the highest learning rate.
        weight_decay: the optimiser's.
        sched: timm's name of a schedule.
        warmup_epochs: epochs in which the learning rate rises from ``warmup_lr`` to ``lr``.
        warmup_lr: the first learning rate of the warmup.
        min_lr: the last learning rate.
        clip_grad: the largest norm of the gradient; 0 or None: any.
        mixup: α of mixup; 0: none.
        cutmix: α of CutMix; 0: none.
        smoothing: label smoothing.
        augment: train on augmented images.
        ema_decay: decay of the averaged weights, which are then kept; None: no average.
        kd: 'soft' or 'hard' distillation of the teacher's outputs, or 'none'.
        kd_alpha: weight of distillation; that of the labels is 1 - kd_alpha.
        kd_temperature: T of soft distillation.
        align: 'mse' or 'manifold' alignment of block outputs with the teacher's, or 'none'.
        align_weight: weight of the alignment in the first epoch.
        align_blocks: indices of the blocks that are aligned; None: the first two and last two.
        keep_params: share of the model's parameters to keep, in (0, 1]; None trains the model as
            it is, without a search.
        mlp: what is chosen of MLPs: 'neurons' (how many hidden neurons stay), or 'ranks'.
        search: when ranks are searched: 'adaptive', 'every' epoch, 'graded', or 'off'.
        search_steps: batches of one search.
        search_fraction: share of the training images that is held out for the search.
        alpha_lr: learning rate of the architecture parameters.
        beta: exponent of the search's penalty for parameters beyond the budget.
        tau_start: temperature at which annealing starts.
        tau_end: temperature at which it ends.
        tau_per: what the temperature is annealed over: the epochs ('epoch'), or each search.
        confirm_plans: adopt a searched plan only where held-out images like it better.
        start_from_allocation: start at the plan of the allocation instead of uniform ranks.
        refine: plans to try before the first epoch, each judged by its loss on held-out images.
        calibration_images: training images that calibrate; 0: none.
        drop_attention_biases: train without the biases of the attentions.
        seed: decides all that is random.
        threads: torch's number of threads; None leaves it as it is.
        workers: processes that decode pictures.
        device: torch's name of a device; None: a GPU where there is one.
        timeout: seconds that a process waits for the others before it ends.
        parallel: how several processes share a step: 'average' (the gradients, in one go), 'ddp'
            (while they are computed), or 'fsdp' (each holds a shard of model and optimiser).
        amp: bfloat16 autocast.
        state_dir: folder of the training state; None keeps none.
        checkpoint_steps: steps after which the state is written within an epoch; 0: time decides.
        checkpoint_seconds: the state is written when it is older than this, too.
        resume: go on from the state in ``state_dir``.
    """

    epochs: int = 10
    finetune_epochs: int = 0
    steps: int | None = None
    batch_size: int = 128
    opt: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    sched: str = "cosine"
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    clip_grad: float | None = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    augment: bool = True
    ema_decay: float | None = None
    kd: str = "soft"
    kd_alpha: float = 0.5
    kd_temperature: float = 2.0
    align: str = "mse"
    align_weight: float = 1.0
    align_blocks: tuple[int, ...] | None = None
    keep_params: float | None = None
    mlp: str = "neurons"
    search: str = "adaptive"
    search_steps: int = 50
    search_fraction: float = 0.1
    alpha_lr: float = 1e-2
    beta: float = 1.5
    tau_start: float = 5.0
    tau_end: float = 0.1
    tau_per: str = "epoch"
    confirm_plans: bool = True
    start_from_allocation: bool = True
    refine: int = 0
    calibration_images: int = 256
    drop_attention_biases: bool = False
    seed: int = 0
    threads: int | None = None
    workers: int = 0
    device: str | None = None
    timeout: float = TIMEOUT
    parallel: str = "average"
    amp: bool = False
    state_dir: str | None = None
    checkpoint_steps: int = 0
    checkpoint_seconds: float = 60.0
    resume: bool = False

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "TrainConfig":
        """The settings of 'adacomcat' or 'comcat', with changes by keyword.

        Raises:
            UserError: the preset or a setting is unknown, or a value is wrong.
        """
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        known = {field.name for field in fields(cls)}
        if unknown := set(changes) - known:
            raise UserError(f"no such training setting: {', '.join(sorted(unknown))}")
        return cls(**(PRESETS[name] | changes)).checked()

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.finetune_epochs

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher takes part in the loss."""
        return self.kd != "none" or self.align != "none"

    @property
    def mixes_images(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def __post_init__(self) -> None:
        if self.clip_grad == 0:  # off, as in timm; as a norm it would stop every weight
            object.__setattr__(self, "clip_grad", None)

    def checked(self) -> "TrainConfig":
        """These settings.

        Raises:
            UserError: a value is wrong; the message names it.
        """
        require(self, TRAINING, optional=_OPTIONAL)
        for name, known in CHOICES.items():
            value = getattr(self, name, None)
            if name != "preset" and value not in known:
                raise UserError(f"unknown {name} {value!r:.60}; choose one of {', '.join(known)}")
        require_kinds(self, augment=bool, confirm_plans=bool, start_from_allocation=bool,
                      drop_attention_biases=bool, amp=bool, resume=bool, opt=str, sched=str)
        blocks = self.align_blocks
        if blocks is not None and not (isinstance(blocks, tuple | list)
                                       and all(type(index) is int for index in blocks)):
            raise UserError("align_blocks must be indices of blocks, like (0, 1); got "
                            f"{blocks!r:.60}")
        if self.refine and (self.keep_params is None or not self.start_from_allocation):
            raise UserError("refine moves the plan that an allocation at keep_params starts from: "
                            "give keep_params, and neither a plan nor the preset comcat")
        require_optimizer(self.opt)
        _require_schedule(self)
        return self

    def with_(self, **changes: Any) -> "TrainConfig":
        """A checked copy with other values."""
        return replace(self, **changes).checked()

    def search_config(self) -> SearchConfig:
        """The settings that concern the search."""
        return SearchConfig(self.search, self.search_steps, self.alpha_lr, self.beta,
                            self.tau_start, self.tau_end, self.tau_per,
                            self.confirm_plans)

    def identity(self) -> dict[str, object]:
        """The settings that must agree between a run and its resumption, as plain values."""
        apart = ("state_dir", "resume", "checkpoint_steps", "checkpoint_seconds",
                 "threads", "workers", "device", "timeout", "parallel")
        return {field.name: list(value) if isinstance(value, tuple) else value
                for field in fields(self) if field.name not in apart
                for value in (getattr(self, field.name),)}


# Settings that may be None, which means 'not at all' or 'as many as there are'.
_OPTIONAL = ("steps", "clip_grad", "ema_decay", "keep_params", "threads")


@functools.cache
def require_optimizer(name: str) -> None:
    """Raise a ``UserError`` where timm's optimiser ``name`` cannot make a plain step here."""
    weight = nn.Parameter(torch.ones(2, 2))
    try:
        optimizer = create_optimizer_v2([weight], opt=name, lr=1e-3)
        weight.square().sum().backward()
        optimizer.step()
    except Exception as error:  # each optimiser has requirements and errors of its own
        raise UserError(f"opt {name!r:.60} cannot train here: {reason(error)}; "
                        "timm.optim.list_optimizers() names others") from error


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Scheduler:
    """One schedule of the learning rate over all epochs of ``steps``, updated at every step."""
    warmup: Any = config.warmup_epochs  # a fraction of an epoch serves too, whatever timm declares
    scheduler, _ = create_scheduler_v2(
        optimizer, config.sched, num_epochs=max(1, config.total_epochs), warmup_epochs=warmup,
        warmup_lr=config.warmup_lr, warmup_prefix=True, min_lr=config.min_lr,
        step_on_epochs=False, updates_per_epoch=steps)
    if scheduler is None:
        raise ValueError("it is none")
    return scheduler


def _require_schedule(config: TrainConfig) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=config.lr)
    try:
        make_schedule(optimizer, config, config.steps or 100).step_update(0)
    except Exception as error:  # each schedule has requirements and errors of its own
        raise UserError(f"sched {config.sched!r:.60} cannot run over {config.total_epochs} epochs: "
                        f"{reason(error)}; cosine is the usual one") from error
