"""Recovering accuracy: losses against a dense teacher, and the training loop."""

from adacomcat.distill.config import PRESETS, TrainConfig
from adacomcat.distill.evaluation import evaluate
from adacomcat.distill.losses import (
    FeatureAlignment,
    alignment_decay,
    distillation_loss,
    manifold_loss,
    mse_loss,
)
from adacomcat.distill.trainer import Trainer

__all__ = ["PRESETS", "FeatureAlignment", "TrainConfig", "Trainer", "alignment_decay",
           "distillation_loss", "evaluate", "manifold_loss", "mse_loss"]
