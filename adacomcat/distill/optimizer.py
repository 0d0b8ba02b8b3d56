"""timm's optimisers and schedules, made from the settings of a training run and judged first."""

import functools
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from adacomcat.errors import UserError, reason


def optimizer_arguments(momentum: float, eps: float | None,
                        betas: tuple[float, ...] | None) -> dict[str, Any]:
    """Keyword arguments of timm's ``create_optimizer_v2``; what is None keeps its default."""
    given = {"eps": eps, "betas": None if betas is None else tuple(betas)}
    return {"momentum": momentum} | {name: value for name, value in given.items()
                                     if value is not None}


@functools.cache
def require_optimizer(name: str, momentum: float = 0.9, eps: float | None = None,
                      betas: tuple[float, ...] | None = None) -> None:
    """Raise a ``UserError`` where timm's optimiser ``name`` cannot make a plain step here."""
    weight = nn.Parameter(torch.ones(2, 2))
    arguments = optimizer_arguments(momentum, eps, betas)
    try:
        optimizer = create_optimizer_v2([weight], opt=name, lr=1e-3, **arguments)
        weight.square().sum().backward()
        optimizer.step()
    except Exception as error:  # each optimiser has requirements and errors of its own
        raise UserError(f"opt {name!r:.60} cannot train here: {reason(error)}; "
                        "timm.optim.list_optimizers() names others") from error


def make_schedule(optimizer: torch.optim.Optimizer, config: Any, steps: int) -> Scheduler:
    """One schedule of the learning rate over all epochs of ``steps``; ``move`` is its step.

    config: a ``TrainConfig``.
    """
    warmup: Any = config.warmup_epochs  # a fraction of an epoch serves too, whatever timm declares
    scheduler, _ = create_scheduler_v2(
        optimizer, config.sched, num_epochs=max(1, config.total_epochs), warmup_epochs=warmup,
        warmup_lr=config.warmup_lr, warmup_prefix=True, min_lr=config.min_lr,
        step_on_epochs=config.sched_per == "epoch", updates_per_epoch=steps)
    if scheduler is None:
        raise ValueError("it is none")
    return scheduler


def move(scheduler: Scheduler, config: Any, epoch: int, update: int) -> None:
    """Set the learning rate for one update, counted from 0, of an epoch, counted from 1."""
    if config.sched_per == "epoch":
        scheduler.step(epoch - 1)
    else:
        scheduler.step_update(update)


def require_schedule(config: Any) -> None:
    """Raise a ``UserError`` where timm's schedule cannot run over the epochs of ``config``."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=config.lr)
    try:
        move(make_schedule(optimizer, config, config.steps or 100), config, epoch=1, update=0)
    except Exception as error:  # each schedule has requirements and errors of its own
        raise UserError(f"sched {config.sched!r:.60} cannot run over {config.total_epochs} epochs: "
                        f"{reason(error)}; cosine is the usual one") from error
