"""The settings of a training run: all that decides it beside the model and the data."""

from dataclasses import dataclass, fields, replace
from typing import Any

from adacomcat.data.folder import PictureAugmentation
from adacomcat.distill.optimizer import optimizer_arguments, require_optimizer, require_schedule
from adacomcat.errors import UserError
from adacomcat.search.search import SearchConfig
from adacomcat.sites import MULTIPLE
from adacomcat.utils.distributed import TIMEOUT
from adacomcat.utils.limits import CHOICES, DECAY, TRAINING, require, require_kinds
from adacomcat.utils.presets import PRESETS

MLP = CHOICES["mlp"]
LEAST_ALPHA = 1e-6  # of a Beta distribution: numpy draws NaN from far smaller ones


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
        grad_accum_steps: passes of a step, each with its part of these images, whose gradients add
            up: the same step in less memory. An alignment compares the images of each pass.
        opt: timm's name of an optimiser.
        opt_eps: its ε; None: its own.
        opt_betas: its β; None: its own.
        momentum: of an optimiser that has one.
        lr: the highest learning rate.
        lr_base: images of a batch that ``lr`` is meant for: it is scaled by ``batch_size`` over
            them. 0 or None: it holds as it is.
        weight_decay: the optimiser's.
        sched: timm's name of a schedule.
        sched_per: whether it moves with every 'step', or with every 'epoch'.
        warmup_epochs: epochs in which the learning rate rises from ``warmup_lr`` to ``lr``.
        warmup_lr: the first learning rate of the warmup.
        min_lr: the last learning rate.
        clip_grad: the largest norm of the gradient; 0 or None: any.
        mixup: α of mixup; 0: none.
        cutmix: α of CutMix; 0: none.
        cutmix_minmax: least and largest share of an image that CutMix takes, in place of what
            ``cutmix`` draws.
        mixup_prob: probability that a batch is mixed.
        mixup_switch_prob: probability that CutMix mixes it, where both can.
        mixup_mode: 'batch' mixes all images of a batch alike; 'pair' and 'elem' do not, and are for
            one process.
        smoothing: label smoothing.
        bce_loss: binary cross-entropy of every class, 1 where the image shows it.
        drop_path: share of the blocks' branches that the last block leaves out at random; it falls
            to 0 in the first one, as timm has it. None: that of the model.
        augment: train on augmented images.
        repeated_aug: how often an image stands in a batch's order, augmented anew each time; an
            epoch then sees so many images fewer.
        aa: pictures alone: timm's RandAugment, AugMix or AutoAugment; see ``PictureAugmentation``
            for this and the next five.
        color_jitter: change of colours.
        reprob: probability of random erasing.
        remode: what is put there.
        recount: erased regions.
        train_interpolation: how training pictures are resized; None: as the model wants it.
        ema_decay: decay of the averaged weights, which are then kept; None: no average.
        kd: 'soft' or 'hard' distillation of the teacher's outputs, or 'none'.
        kd_alpha: weight of distillation; that of the labels is 1 - kd_alpha.
        kd_temperature: T of soft distillation.
        kd_reduction: soft distillation is a mean over images ('batchmean'), or over all outputs
            ('mean'), which is smaller by the number of classes.
        align: alignment of block outputs with the teacher's: 'mse' relative to the teacher's,
            'manifold' of Gram matrices, 'comcat' by the sum of mean squared errors whose weight
            falls with the product of all cosines to 0.01, or 'none'.
        align_weight: weight of the alignment in the first epoch.
        align_blocks: indices of the blocks that are aligned; None: the first two and last two.
        keep_params: share of the model's parameters to keep, in (0, 1]; None trains the model as
            it is, without a search.
        adapters: rank of adapters that are trained with the classifier beside the frozen model;
            None trains the model itself.
        rank_multiple: ranks per head are multiples of it, other ranks of twice that.
        mlp: what is chosen of MLPs: 'neurons' (how many hidden neurons stay), or 'ranks'.
        search: when ranks are searched: 'adaptive', 'every' epoch, 'graded', or 'off'.
        search_steps: batches of one search; 0 or None: once through its images.
        search_batch_size: images of a batch of the search; None: as of the training.
        search_images: those that the search sees: 'held-out' training images, or 'validation'
            images in their order, which then say too much of its result.
        search_fraction: share of the training images that is held out for the search.
        first_search: the epoch before which the first search may be.
        menu: candidate ranks in 'steps', or the menus of 'comcat'.
        choose: the likeliest plan within the 'budget', or the 'argmax' of every site.
        decompose_anew: decompose the factors in force again before a search.
        new_optimizer: forget the optimiser's moments after a search.
        alpha_lr: learning rate of the architecture parameters.
        alpha_weight_decay: of the architecture parameters.
        beta: exponent of the search's penalty for parameters beyond the budget.
        tau_start: temperature at which annealing starts.
        tau_end: temperature at which it ends.
        tau_per: what the temperature is annealed over: the epochs ('epoch'), or each search.
        confirm_plans: adopt a searched plan only where held-out images like it better.
        start: the ranks that training starts at: those of the 'allocation', 'uniform' ones, or the
            'largest' of all candidates.
        refine: plans to try before the first epoch, each judged by its loss on held-out images.
        calibration_images: training images that calibrate; 0: none.
        drop_attention_biases: train without the biases of the attentions.
        finetune_attention_biases: the dropped biases are trained again in the last
            ``finetune_epochs``, from zero.
        seed: decides all that is random.
        threads: torch's number of threads; None leaves it as it is.
        workers: processes that decode pictures.
        device: torch's name of a device; None: a GPU where there is one.
        timeout: seconds that a process waits for the others before it ends.
        parallel: how several processes share a step: 'average' (the gradients, in one go), 'ddp'
            (while they are computed), or 'fsdp' (each holds a shard of model and optimiser).
        amp: autocast to ``amp_dtype``.
        amp_dtype: 'bfloat16', or 'float16' with a scaled loss.
        state_dir: folder of the training state; None keeps none.
        checkpoint_steps: steps after which the state is written within an epoch; 0: time decides.
        checkpoint_seconds: the state is written when it is older than this, too.
        resume: go on from the state in ``state_dir``.
    """

    epochs: int = 10
    finetune_epochs: int = 0
    steps: int | None = None
    batch_size: int = 128
    grad_accum_steps: int = 1
    opt: str = "adamw"
    opt_eps: float | None = None
    opt_betas: tuple[float, ...] | None = None
    momentum: float = 0.9
    lr: float = 5e-4
    lr_base: int | None = None
    weight_decay: float = 0.05
    sched: str = "cosine"
    sched_per: str = "step"
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    clip_grad: float | None = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, ...] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    smoothing: float = 0.1
    bce_loss: bool = False
    drop_path: float | None = None
    augment: bool = True
    repeated_aug: int = 1
    aa: str | None = None
    color_jitter: float = 0.4
    reprob: float = 0.0
    remode: str = "const"
    recount: int = 1
    train_interpolation: str | None = None
    ema_decay: float | None = None
    kd: str = "soft"
    kd_alpha: float = 0.5
    kd_temperature: float = 2.0
    kd_reduction: str = "batchmean"
    align: str = "mse"
    align_weight: float = 1.0
    align_blocks: tuple[int, ...] | None = None
    adapters: int | None = None
    keep_params: float | None = None
    rank_multiple: int = MULTIPLE
    mlp: str = "neurons"
    search: str = "adaptive"
    search_steps: int | None = 50
    search_batch_size: int | None = None
    search_images: str = "held-out"
    search_fraction: float = 0.1
    first_search: int = 1
    menu: str = "steps"
    choose: str = "budget"
    decompose_anew: bool = False
    new_optimizer: bool = False
    alpha_lr: float = 1e-2
    alpha_weight_decay: float = 0.0
    beta: float = 1.5
    tau_start: float = 5.0
    tau_end: float = 0.1
    tau_per: str = "epoch"
    confirm_plans: bool = True
    start: str = "allocation"
    refine: int = 0
    calibration_images: int = 256
    drop_attention_biases: bool = False
    finetune_attention_biases: bool = False
    seed: int = 0
    threads: int | None = None
    workers: int = 0
    device: str | None = None
    timeout: float = TIMEOUT
    parallel: str = "average"
    amp: bool = False
    amp_dtype: str = "bfloat16"
    state_dir: str | None = None
    checkpoint_steps: int = 0
    checkpoint_seconds: float = 60.0
    resume: bool = False

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "TrainConfig":
        """The settings of 'adacomcat', 'comcat' or 'adaptive-comcat', with changes by keyword.

        Raises:
            UserError: the preset or a setting is unknown, or a value is wrong.
        """
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        known = {field.name for field in fields(cls)}
        if unknown := set(changes) - known:
            raise UserError(f"no such training setting: {', '.join(sorted(unknown))}")
        return cls(**{**PRESETS[name], **changes}).checked()

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.finetune_epochs

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher takes part in the loss."""
        return self.kd != "none" or self.align != "none"

    @property
    def highest_lr(self) -> float:
        """``lr``, scaled to the batch."""
        return self.lr if self.lr_base is None else self.lr * self.batch_size / self.lr_base

    @property
    def mixes_images(self) -> bool:
        return bool(self.mixup or self.cutmix or self.cutmix_minmax)

    @property
    def picture_augmentation(self) -> PictureAugmentation:
        """How training pictures are augmented."""
        return PictureAugmentation(self.aa, self.color_jitter, self.reprob, self.remode,
                                   self.recount, self.train_interpolation)

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """What timm's optimiser gets beside its rate and its weight decay."""
        return optimizer_arguments(self.momentum, self.opt_eps, self.opt_betas)

    def __post_init__(self) -> None:
        # 0 is off, as in timm: as a norm it would stop every weight. Flags say 'none'.
        for name in ("clip_grad", "lr_base", "search_steps", "aa"):
            if getattr(self, name) in (0, "none"):
                object.__setattr__(self, name, None)
        for name in ("opt_betas", "cutmix_minmax"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def checked(self) -> "TrainConfig":
        """These settings.

        Raises:
            UserError: a value is wrong; the message names it.
        """
        require(self, TRAINING, optional=_OPTIONAL)
        for name, known in CHOICES.items():
            value = getattr(self, name, None)
            optional = value is None and name == "train_interpolation"
            if name != "preset" and value not in known and not optional:
                raise UserError(f"unknown {name} {value!r:.60}; choose one of {', '.join(known)}")
        require_kinds(self, augment=bool, confirm_plans=bool, drop_attention_biases=bool,
                      finetune_attention_biases=bool, decompose_anew=bool, new_optimizer=bool,
                      amp=bool, bce_loss=bool, resume=bool, opt=str, sched=str)
        for name in ("mixup", "cutmix"):
            if 0 < getattr(self, name) < LEAST_ALPHA:
                raise UserError(f"{name} must be 0 or at least {LEAST_ALPHA:g}; got "
                                f"{getattr(self, name)!r:.60}")
        _require_numbers(self, "opt_betas", 2, 3)
        _require_numbers(self, "cutmix_minmax", 2, 2)
        blocks = self.align_blocks
        if blocks is not None and not (isinstance(blocks, tuple | list)
                                       and all(type(index) is int for index in blocks)):
            raise UserError("align_blocks must be indices of blocks, like (0, 1); got "
                            f"{blocks!r:.60}")
        if self.refine and (self.keep_params is None or self.start != "allocation"):
            raise UserError("refine moves the plan that an allocation at keep_params starts from: "
                            "give keep_params, and neither a plan nor the preset comcat")
        if self.adapters is not None and (self.keep_params is not None
                                          or self.drop_attention_biases):
            raise UserError("adapters train beside a model that stays as it is: give neither "
                            "keep_params nor the presets comcat and adaptive-comcat")
        if self.bce_loss and self.smoothing:
            raise UserError("bce_loss knows classes that are there and classes that are not: give "
                            "smoothing 0")
        if self.parallel != "average" and (self.decompose_anew or self.drop_attention_biases
                                           or self.amp_dtype == "float16"):
            raise UserError(f"parallel {self.parallel!r} goes neither with the presets comcat and "
                            "adaptive-comcat nor with float16: leave it at 'average'")
        require_optimizer(self.opt, self.momentum, self.opt_eps, self.opt_betas)
        require_schedule(self)
        return self

    def with_(self, **changes: Any) -> "TrainConfig":
        """A checked copy with other values."""
        return replace(self, **changes).checked()

    def search_config(self) -> SearchConfig:
        """The settings that concern the search."""
        return SearchConfig(self.search, self.alpha_lr, self.beta, self.tau_start, self.tau_end,
                            self.tau_per, self.confirm_plans, self.alpha_weight_decay, self.choose,
                            self.decompose_anew, self.first_search)

    def identity(self) -> dict[str, object]:
        """The settings that must agree between a run and its resumption, as plain values."""
        apart = ("state_dir", "resume", "checkpoint_steps", "checkpoint_seconds",
                 "threads", "workers", "device", "timeout", "parallel")
        return {field.name: list(value) if isinstance(value, tuple) else value
                for field in fields(self) if field.name not in apart
                for value in (getattr(self, field.name),)}


# Settings that may be None, which means 'not at all' or 'as many as there are'.
_OPTIONAL = ("steps", "clip_grad", "ema_decay", "keep_params", "threads", "lr_base", "drop_path",
             "adapters", "opt_eps", "search_steps", "search_batch_size")


def _require_numbers(config: TrainConfig, name: str, least: int, most: int) -> None:
    """Raise a ``UserError`` unless the setting is None or so many numbers in [0, 1)."""
    values = getattr(config, name)
    if values is None:
        return
    if not (isinstance(values, tuple) and least <= len(values) <= most
            and all(DECAY.holds(value) for value in values)):
        count = f"{least}" if least == most else f"{least} to {most}"
        raise UserError(f"{name} must be {count} numbers in [0, 1); got {values!r:.60}")

