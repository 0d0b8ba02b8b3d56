"""A small training run on the bundled digits."""

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from adacomcat import train
from adacomcat.data import datasets
from adacomcat.distill import TrainConfig
from adacomcat.distill.trainer import Trainer
from adacomcat.search import RankSearch
from adacomcat.utils import stopping

STEPS = 6  # of an epoch of the small run


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1,
                              embed_dim=48, depth=2, num_heads=2, num_classes=10)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_sets(model: nn.Module, count: int = 430) -> tuple[Any, Any]:
    train_set, test_set = datasets.train_and_test("digits", None, datasets.model_data_config(model))
    return train_set.subset(torch.arange(count)), test_set.subset(torch.arange(100))


def small_config(**changes: Any) -> TrainConfig:
    settings = {"epochs": 3, "batch_size": 64, "lr": 2e-3, "keep_params": 0.4, "search_steps": 3,
                "alpha_lr": 0.2, "calibration_images": 64, "mixup": 0.2, "ema_decay": 0.9,
                "align": "manifold", "threads": 1, "device": "cpu"}
    return TrainConfig.preset("adacomcat", **settings | changes)


def small_run(**changes: Any) -> train.TrainResult:
    model = make_model()
    return train.run(model, small_config(**changes), *make_sets(model))


def losses_and_plan(results: dict[str, Any]) -> dict[str, Any]:
    return {"plan": results.get("plan"), "losses": [row["loss"] for row in results["history"]],
            "judged": [row["test_loss"] for row in results["history"]],
            "searches": [search["loss"] for search in results["searches"]]}


def stopped_run(stop: int, settings: dict[str, Any]) -> dict[str, Any]:
    """``losses_and_plan`` of a run; empty where it is asked to stop after ``stop`` steps."""
    if stop:
        steps, real = itertools.count(1), Trainer._after_step

        def counted(self: Trainer) -> None:
            if next(steps) == stop:
                stopping._asked.append(stopping.SIGNALS[0])
            real(self)
        Trainer._after_step = counted
    try:
        return losses_and_plan(small_run(**settings).results)
    except stopping.Stopped:
        return {}


def killed_run(when: str, state: Path) -> None:
    """SIGKILL in the second epoch: at a step, in the search, or with a state half written."""
    owner, name = {"step": (Trainer, "_train_step"), "unsaved step": (Trainer, "_train_step"),
                   "search": (RankSearch, "step"), "save": (os, "replace")}[when]
    last = {"step": STEPS + 4, "unsaved step": STEPS + 3, "search": 5, "save": 5}[when]
    calls, real = itertools.count(1), getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, counted)
    small_run(state_dir=str(state), checkpoint_steps=2)
