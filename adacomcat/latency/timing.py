"""Measured latency of what ranks decide, and of whole models, on this machine.

What is timed is what one deploys: where our CPU kernels are built, the fused sublayers of
``adacomcat.optimize``; elsewhere the plain modules. Ranks that one op takes together (``qk`` and
``vo`` of an attention, ``fc1`` and ``fc2`` of an MLP) are timed together, on a grid, so nothing is
said of how they interact; between its points the time is multilinear in the ranks.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from adacomcat.fuse import optimize
from adacomcat.ops import backends
from adacomcat.utils.model import input_size

Key = TypeVar("Key", bound=Hashable)

WARM_UP, LEAST_REPEATS = 2, 5


def latency(models: dict[str, nn.Module], batch: int = 1, repeats: int = 20) -> dict[str, float]:
    """Median milliseconds of a forward pass of each model, measured in turn, A B A B …"""
    def forward(model: nn.Module) -> Callable[[], object]:
        parameter = next(model.parameters())
        images = torch.randn(batch, *input_size(model)).to(parameter)
        return lambda: model(images)

    return interleaved({name: forward(model) for name, model in models.items()}, repeats)


@torch.inference_mode()
def interleaved(runs: Mapping[Key, Callable[[], object]], repeats: int = 20,
                seconds: float = math.inf,
                clock: Callable[[], float] = time.perf_counter) -> dict[Key, float]:
    """Median milliseconds of each run, measured in turn; after ``seconds`` a few repeats do."""
    spent: dict[Key, list[float]] = {key: [] for key in runs}
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else (lambda: None)
    begin = time.perf_counter()
    for repeat in range(WARM_UP + repeats):
        if repeat >= WARM_UP + LEAST_REPEATS and time.perf_counter() - begin > seconds:
            break
        for key, run in runs.items():
            start = clock()
            run()
            synchronize()
            if repeat >= WARM_UP:
                spent[key].append((clock() - start) * 1e3)
    return {key: statistics.median(times) for key, times in spent.items()}
SECONDS = 5.0  # enough for one shape
REPEATS = 40


class Timed(NamedTuple):
    """A module, the method of it that is timed, and its arguments."""

    module: nn.Module
    method: str
    args: tuple
    kwargs: dict[str, Any]

    def __call__(self) -> object:
        return getattr(self.module, self.method)(*self.args, **self.kwargs)


# Milliseconds of each; tests put a model of cost in the place of the clock.
Measure = Callable[[Mapping[Hashable, Timed]], dict[Hashable, float]]


def measure(runs: Mapping[Hashable, Timed]) -> dict[Hashable, float]:
    """Median milliseconds, measured in turn. On one thread of a CPU it is that thread's own time:
    while other work holds the core, it stands still."""
    on_cpu = not any(parameter.is_cuda for run in runs.values()
                     for parameter in run.module.parameters())
    alone = on_cpu and torch.get_num_threads() == 1
    return interleaved(runs, REPEATS, SECONDS, time.thread_time if alone else time.perf_counter)


def deployed(model: nn.Module) -> nn.Module:
    """A copy as it runs in the end, whose latency counts."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and backends.available()["cpp"] is None:
        return optimize(model)
    return copy.deepcopy(model).eval()


def model_latencies(models: Mapping[str, nn.Module], batch: int = 1,
                    measure: Measure = measure) -> dict[str, float]:
    """Milliseconds of each model as deployed, for ``batch`` images."""
    return measure({name: forward_pass(deployed(model), batch) for name, model in models.items()})


def forward_pass(model: nn.Module, batch: int) -> Timed:
    images = torch.randn(batch, *input_size(model)).to(next(model.parameters()))
    return Timed(model, "__call__", (images,), {})
