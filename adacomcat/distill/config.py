"""The settings of a training run: all that decides it beside the model and the data."""

from dataclasses import dataclass, fields, replace
from typing import Any

from adacomcat.distill.losses import ALIGN, KD
from adacomcat.errors import UserError
from adacomcat.search.policy import POLICIES
from adacomcat.search.search import SearchConfig

MLP = ("neurons", "ranks")

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
        clip_grad: the largest norm of the gradient; None: any.
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

    def checked(self) -> "TrainConfig":
        """These settings.

        Raises:
            UserError: a value is wrong; the message names it.
        """
        if self.keep_params is not None and not 0 < self.keep_params <= 1:
            raise UserError(f"keep must be a fraction in (0, 1], like 0.5; got {self.keep_params}")
        for name, value, known in (("kd", self.kd, KD), ("align", self.align, ALIGN),
                                   ("search", self.search, POLICIES), ("mlp", self.mlp, MLP)):
            if value not in known:
                raise UserError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
        if self.refine and (self.keep_params is None or not self.start_from_allocation):
            raise UserError("refine moves the plan that an allocation at keep_params starts from: "
                            "give keep_params, and neither a plan nor the preset comcat")
        for name in ("epochs", "finetune_epochs", "refine", "search_steps", "checkpoint_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative; got {getattr(self, name)}")
        if not self.checkpoint_seconds > 0:
            raise UserError("checkpoint_seconds must be above 0; got "
                            f"{self.checkpoint_seconds}")
        for name in ("batch_size", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}")
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
                 "threads", "workers", "device")
        return {field.name: list(value) if isinstance(value, tuple) else value
                for field in fields(self) if field.name not in apart
                for value in (getattr(self, field.name),)}
