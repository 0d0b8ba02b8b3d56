"""Presets of training: name → the settings of ``TrainConfig`` that differ from its defaults.

This module imports neither torch nor timm, so that --help answers at once.
"""

from collections.abc import Mapping
from typing import Any

# The published training of ComCAT, as its code and its commands for DeiT have it.
_COMCAT: dict[str, Any] = {
    # plain SVD without the attentions' biases, from the largest ranks of its menus
    "calibration_images": 0, "drop_attention_biases": True, "finetune_attention_biases": True,
    "mlp": "ranks", "menu": "comcat", "start": "largest",
    # a search before every epoch but the first, once through the validation images
    "search": "every", "first_search": 2, "search_images": "validation", "search_steps": None,
    "search_batch_size": 128, "alpha_weight_decay": 5e-4, "tau_per": "search", "choose": "argmax",
    "confirm_plans": False, "decompose_anew": True, "new_optimizer": True,
    # hard distillation and aligned blocks
    "kd": "hard", "kd_temperature": 1.0, "kd_reduction": "mean", "align": "comcat",
    "align_weight": 0.5,
    # DeiT's training
    "lr_base": 512, "min_lr": 1e-5, "sched_per": "epoch", "clip_grad": None, "drop_path": 0.1,
    "mixup": 0.8, "cutmix": 1.0, "aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3,
    "reprob": 0.25, "remode": "pixel", "train_interpolation": "bicubic",
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "adacomcat": {}, "comcat": _COMCAT, "adaptive-comcat": _COMCAT | {"search": "adaptive"},
}


def explained() -> str:
    """What every preset sets, as a sentence each; what ComCAT's two share is said once."""
    def settings(of: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in of.items())

    changed = dict(PRESETS["adaptive-comcat"].items() - _COMCAT.items())
    return (f"--preset adacomcat leaves all defaults. --preset comcat sets {settings(_COMCAT)}. "
            f"--preset adaptive-comcat sets the same with {settings(changed)}.")
