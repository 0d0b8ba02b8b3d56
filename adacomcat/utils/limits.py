"""What numbers may be: one table for the flags of the command line and for settings in Python.

``cli.arguments`` judges flags by it, ``TrainConfig`` and ``RecoveryConfig`` their fields. This
module imports neither torch nor timm, so that --help answers at once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from adacomcat.errors import UserError
from adacomcat.utils.presets import PRESETS

_LARGEST = 2**31 - 1  # of a count; more overflows in the libraries that count with it
_LARGEST_REAL = 1e9  # beyond any use; its square and its products are numbers in float32


@dataclass(frozen=True)
class Limit:
    """Finite numbers between two bounds.

    Args:
        low: the lower bound.
        high: the upper bound.
        whole: only whole numbers.
        above: ``low`` itself is no such number.
        below: ``high`` itself is no such number.
    """

    low: float
    high: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.high in (math.inf, _LARGEST):
            return f"{kind} above {self.low:g}" if self.above else f"{kind} of at least {self.low}"
        if self.whole:
            return f"{kind} from {self.low} to {self.high}"
        opening, closing = "(" if self.above else "[", ")" if self.below else "]"
        bounds = f"{opening}{self.low:g}, {self.high:g}{closing}"
        if self.high == 1:
            return f"a fraction in {bounds}, like 0.5 or 50%"
        return f"{kind} in {bounds}"

    def holds(self, value: object) -> bool:
        """Whether ``value`` is such a number; True and False are none."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number: Any = value  # NaN is beyond every bound
        return (self.low <= number <= self.high and abs(number) != math.inf
                and not (self.above and number == self.low)
                and not (self.below and number == self.high))

    def parse(self, text: str) -> int | float:
        """The number that ``text`` spells; a fraction may be a percentage.

        Raises:
            ValueError: it spells no such number.
        """
        value: int | float
        if self.whole:
            value = int(text)
        elif self.high == 1:
            value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        else:
            value = float(text)
        if not self.holds(value):
            raise ValueError(text)
        return value


def at_least(least: int, most: int = _LARGEST) -> Limit:
    """Whole numbers from ``least`` on."""
    return Limit(least, most, whole=True)


POSITIVE, NOT_NEGATIVE = Limit(0, _LARGEST_REAL, above=True), Limit(0, _LARGEST_REAL)
FRACTION = Limit(0, 1, above=True)  # 1 is all
PART = Limit(0, 1, above=True, below=True)  # neither nothing nor all
WEIGHT, DECAY = Limit(0, 1), Limit(0, 1, below=True)
PERCENT = Limit(0, 100)
MIXING = Limit(0, 100)  # the α of a Beta distribution
COUNT, NUMBER = at_least(0), at_least(1)
SEED = at_least(0, 2**63 - 1)  # what numpy, torch and sums of seeds can hold
PROCESSES = at_least(0, 1024)
ADAPTER_RANK = at_least(1, 1024)
WAITING = Limit(1, 10**6)  # seconds

# Setting → what it may be, for ``TrainConfig`` and the flags of ``train``.
TRAINING: Mapping[str, Limit] = {
    "epochs": COUNT, "finetune_epochs": COUNT, "steps": NUMBER, "batch_size": NUMBER,
    "grad_accum_steps": NUMBER, "lr": POSITIVE, "weight_decay": NOT_NEGATIVE,
    "warmup_epochs": NOT_NEGATIVE, "warmup_lr": NOT_NEGATIVE, "min_lr": NOT_NEGATIVE,
    "clip_grad": NOT_NEGATIVE, "opt_eps": POSITIVE, "momentum": DECAY, "mixup": MIXING,
    "cutmix": MIXING, "mixup_prob": WEIGHT, "mixup_switch_prob": WEIGHT, "smoothing": DECAY,
    "drop_path": DECAY, "repeated_aug": NUMBER, "color_jitter": WEIGHT, "reprob": WEIGHT,
    "recount": NUMBER, "ema_decay": DECAY, "kd_alpha": WEIGHT, "kd_temperature": POSITIVE,
    "align_weight": NOT_NEGATIVE, "keep_params": FRACTION, "rank_multiple": NUMBER,
    "search_steps": COUNT, "search_fraction": PART, "search_batch_size": NUMBER,
    "first_search": NUMBER, "lr_base": COUNT, "alpha_weight_decay": NOT_NEGATIVE,
    "alpha_lr": POSITIVE, "beta": NOT_NEGATIVE, "tau_start": POSITIVE, "tau_end": POSITIVE,
    "refine": COUNT, "calibration_images": COUNT, "seed": SEED, "threads": NUMBER,
    "workers": PROCESSES, "checkpoint_steps": COUNT, "checkpoint_seconds": POSITIVE,
    "timeout": WAITING, "adapters": ADAPTER_RANK,
}
# The same for ``RecoveryConfig`` and the flags of ``recover``.
RECOVERY: Mapping[str, Limit] = {
    "minutes": POSITIVE, "steps": COUNT, "lr": POSITIVE, "weight_decay": NOT_NEGATIVE,
    "warmup": Limit(0, 1), "block_weight": NOT_NEGATIVE, "clip_grad": NOT_NEGATIVE,
    "ema_decay": DECAY, "seed": SEED,
}
# The same for ``CustomizeConfig`` and the flags of ``customize``.
CUSTOMIZATION: Mapping[str, Limit] = {
    "rank": ADAPTER_RANK, "steps": NUMBER, "batch_size": NUMBER, "lr": POSITIVE,
    "weight_decay": NOT_NEGATIVE, "clip_grad": NOT_NEGATIVE, "prior_weight": NOT_NEGATIVE,
    "num_class_images": NUMBER, "alpha": Limit(0, 10), "resolution": at_least(8, 8192),
    "sample_steps": COUNT, "seed": SEED, "checkpoint_steps": COUNT, "checkpoint_seconds": POSITIVE,
}
INITS = ("zero", "linear")  # of adapters
# Setting of training → the words that it may be.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "preset": tuple(PRESETS),
    "search": ("adaptive", "every", "graded", "off"),
    "mlp": ("neurons", "ranks"), "kd": ("soft", "hard", "none"),
    "kd_reduction": ("batchmean", "mean"),
    "align": ("mse", "manifold", "comcat", "none"), "tau_per": ("epoch", "search"),
    "start": ("allocation", "uniform", "largest"), "menu": ("steps", "comcat"),
    "choose": ("budget", "argmax"), "search_images": ("held-out", "validation"),
    "sched_per": ("step", "epoch"), "mixup_mode": ("batch", "pair", "elem"),
    "parallel": ("average", "ddp", "fsdp"),
    "remode": ("const", "rand", "pixel"), "amp_dtype": ("bfloat16", "float16"),
    "train_interpolation": ("bilinear", "bicubic", "random"),
}
BACKENDS = ("reference", "cpp", "triton", "cuda")
# Runtimes whose fused attention bounds the ranks.
DEPLOYMENTS = ("any", "flash", "tensorrt")
# What weights are rounded to → bits of a number; activations are rounded with int8.
QUANTIZATIONS: Mapping[str, int] = {"int8": 8, "int4": 4}
WEIGHT_BITS = tuple(QUANTIZATIONS.values())
FLOAT_BITS = (32, 16)
# What ``export`` writes, and in which dtypes.
EXPORT_FORMATS = ("onnx", "openvino", "torch", "aoti", "executorch", "plain", "dense")
EXPORT_DTYPES = ("float32", "float16", "bfloat16")


def require(settings: object, limits: Mapping[str, Limit], optional: tuple[str, ...] = ()) -> None:
    """Raise a ``UserError`` that names the first attribute of ``settings`` beyond its limit.

    Args:
        settings: has an attribute for every name in ``limits``.
        limits: what the attributes may be.
        optional: the names of those that may also be None.
    """
    for name, limit in limits.items():
        value = getattr(settings, name)
        if not (limit.holds(value) or (value is None and name in optional)):
            raise UserError(f"{name} must be {limit}; got {value!r:.60}")


def require_kinds(settings: object, **kinds: type) -> None:
    """Raise a ``UserError`` that names the first attribute which is of another kind."""
    for name, kind in kinds.items():
        value = getattr(settings, name)
        if not isinstance(value, kind):
            raise UserError(f"{name} must be {_KINDS[kind]}; got {value!r:.60}")


_KINDS = {bool: "True or False", str: "a word"}
