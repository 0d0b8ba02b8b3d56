"""The clock: median milliseconds of calls, measured in turn, and models as they are deployed.

Where the CPU kernels are built, a deployed model is what ``adacomcat.optimize`` makes of it;
elsewhere it is the plain model.
"""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from adacomcat.fuse import optimize
from adacomcat.ops import backends
from adacomcat.utils.model import copied, input_size

Key = TypeVar("Key", bound=Hashable)

WARM_UP, LEAST_REPEATS = 2, 5
REPEATS = 40
SECONDS = 5.0  # enough for one shape


def latency(models: dict[str, nn.Module], batch: int = 1, repeats: int = 20) -> dict[str, float]:
    """Median milliseconds of a forward pass of each model, as it is, measured in turn.

    Args:
        models: name → model; each on its own device.
        batch: images in one forward pass.
        repeats: forward passes that count.
    """
    def forward(model: nn.Module) -> Callable[[], object]:
        parameter = next(model.parameters())
        images = torch.randn(batch, *input_size(model)).to(parameter)
        return lambda: model(images)

    return interleaved({name: forward(model) for name, model in models.items()}, repeats)


@torch.inference_mode()
def interleaved(runs: Mapping[Key, Callable[[], object]], repeats: int = 20,
                seconds: float = math.inf,
                clock: Callable[[], float] = time.perf_counter) -> dict[Key, float]:
    """Median milliseconds of each run, measured in turn: A B A B …

    Once ``seconds`` are over, ``LEAST_REPEATS`` are enough.
    """
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


class Call(NamedTuple):
    """One call: a module, the name of its method, and the arguments."""

    module: nn.Module
    method: str
    args: tuple
    kwargs: dict[str, Any]

    def __call__(self) -> object:
        return getattr(self.module, self.method)(*self.args, **self.kwargs)


# Calls by key → their milliseconds. Tests put a model of cost in the place of the clock.
Measure = Callable[[Mapping[str, Call]], dict[str, float]]


def measure(calls: Mapping[str, Call]) -> dict[str, float]:
    """Median milliseconds of each call, measured in turn.

    On one CPU thread this is the thread's own time, which stands still while other work holds the
    core.
    """
    on_cpu = not any(parameter.is_cuda for call in calls.values()
                     for parameter in call.module.parameters())
    alone = on_cpu and torch.get_num_threads() == 1
    return interleaved(calls, REPEATS, SECONDS, time.thread_time if alone else time.perf_counter)


def deployed(model: nn.Module) -> nn.Module:
    """A copy of ``model`` as it runs in the end: its latency is the one that counts."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and backends.available()["cpp"] is None:
        return optimize(model)
    return copied(model).eval()


def model_latencies(models: Mapping[str, nn.Module], batch: int = 1,
                    measure: Measure = measure) -> dict[str, float]:
    """Milliseconds of a forward pass of each model as deployed, for ``batch`` images."""
    return measure({name: forward_pass(deployed(model), batch) for name, model in models.items()})


def forward_pass(model: nn.Module, batch: int) -> Call:
    """The call of ``model`` on ``batch`` random images."""
    images = torch.randn(batch, *input_size(model)).to(next(model.parameters()))
    return Call(model, "__call__", (images,), {})
