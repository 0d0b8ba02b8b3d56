"""Everything that decides a training run, beside the model and the data."""

from dataclasses import dataclass, fields, replace

from adacomcat.distill.losses import ALIGN, KD
from adacomcat.errors import UserError
from adacomcat.search.policy import POLICIES
from adacomcat.search.search import SearchConfig

MLP = ("neurons", "ranks")

# What ComCAT's published code does where it differs: plain SVD without attention biases, uniform
# start, a search every epoch with τ annealed per search, hard distillation, no aligned blocks.
PRESETS = {
    "adacomcat": {},
    "comcat": {"search": "every", "kd": "hard", "align": "none", "calibration_images": 0,
               "drop_attention_biases": True, "start_from_allocation": False, "tau_per": "search",
               "confirm_plans": False, "mlp": "ranks"},
}


@dataclass(frozen=True)
class TrainConfig:
    """Epochs count from 1. ``keep_params`` None trains the model as it is, without a search.

    Stage one searches and trains for ``epochs``, stage two trains ``finetune_epochs`` at the ranks
    found; one learning-rate schedule spans both.
    """

    epochs: int = 10
    finetune_epochs: int = 0
    steps: int | None = None  # every epoch ends after so many; None: after all images
    batch_size: int = 128  # over all processes
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
    mlp: str = "neurons"  # what search and allocation choose of MLPs: 'neurons', or 'ranks'
    search: str = "adaptive"
    search_steps: int = 50  # per search
    search_fraction: float = 0.1  # of the training images, held out for the search
    alpha_lr: float = 1e-2
    beta: float = 1.5
    tau_start: float = 5.0
    tau_end: float = 0.1
    tau_per: str = "epoch"
    confirm_plans: bool = True
    start_from_allocation: bool = True
    refine: int = 0  # plans tried before the first epoch, judged by held-out images
    calibration_images: int = 256
    drop_attention_biases: bool = False
    seed: int = 0
    threads: int | None = None
    workers: int = 0
    device: str | None = None
    amp: bool = False  # bfloat16 autocast
    state_dir: str | None = None  # where the training state goes; None keeps none
    checkpoint_steps: int = 0  # also every so many steps, beside every epoch
    resume: bool = False

    @classmethod
    def preset(cls, name: str, **changes: object) -> "TrainConfig":
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
        return self.kd != "none" or self.align != "none"

    def checked(self) -> "TrainConfig":
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
        for name in ("batch_size", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}")
        return self

    def with_(self, **changes: object) -> "TrainConfig":
        return replace(self, **changes).checked()

    def search_config(self) -> SearchConfig:
        return SearchConfig(self.search, self.search_steps, self.alpha_lr, self.beta,
                            self.tau_start, self.tau_end, self.tau_per,
                            self.confirm_plans)

    def identity(self) -> dict[str, object]:
        """What must agree between a run and its resumption."""
        apart = ("state_dir", "resume", "checkpoint_steps", "threads", "workers", "device")
        return {field.name: list(value) if isinstance(value, tuple) else value
                for field in fields(self) if field.name not in apart
                for value in (getattr(self, field.name),)}
