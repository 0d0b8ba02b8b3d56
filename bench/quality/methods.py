"""The methods that are compared: one entry in METHODS for each."""

import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from baselines import (
    afm_metric,
    asvd_metric,
    collect_inputs,
    cut_matrices,
    cut_products,
    svd_llm_metric,
)
from torch import Tensor, nn

import adacomcat
from adacomcat import train
from adacomcat.convert.calibrate import calibrate
from adacomcat.data.collage import collages
from adacomcat.distill.config import TrainConfig
from adacomcat.errors import UserError


@dataclass
class Subject:
    """A dense model, the data that methods may use, and the measure of a compressed model.

    calibration: (N, C, H, W). measure: model → quality. train_set: labelled images; without them no
    method searches or trains. training: settings of TrainConfig for those that do.
    """

    model: nn.Module
    calibration: Tensor
    measure: Callable[[nn.Module], dict[str, float]]
    train_set: Any = None
    training: dict[str, Any] = field(default_factory=dict)
    _collected: dict[Hashable, tuple[Any, float]] = field(default_factory=dict)

    def collected(self, collect: Callable[[nn.Module, Tensor], Any] | None) -> tuple[Any, float]:
        """(statistics of the dense model, seconds they took), collected once and then kept."""
        if collect is None:
            return None, 0.0
        if collect not in self._collected:
            start = time.perf_counter()
            made = collect(self.model, self.calibration)
            self._collected[collect] = made, time.perf_counter() - start
        return self._collected[collect]


class Method(NamedTuple):
    """compress: (subject, keep, statistics) → model. collect: (model, images) → the statistics."""

    compress: Callable[[Subject, float, Any], nn.Module]
    collect: Callable[[nn.Module, Tensor], Any] | None = None
    trains: bool = False  # on labels
    named: bool = False  # runs only where the command line names it


def compressed(method: Method, subject: Subject, keep: float) -> tuple[nn.Module, float]:
    """(model in eval mode, seconds with calibration)."""
    statistics, seconds = subject.collected(method.collect)
    start = time.perf_counter()
    model = method.compress(subject, keep, statistics).eval()
    return model, seconds + time.perf_counter() - start


def trained(subject: Subject, keep: float, preset: str, **changes: Any) -> train.TrainResult:
    settings = {"keep_params": keep, **subject.training, **changes}
    return train.run(subject.model, TrainConfig.preset(preset, **settings), subject.train_set)


def _matrices(metric: Callable | None) -> Method:
    return Method(lambda subject, keep, inputs: cut_matrices(subject.model, keep, metric, inputs),
                  collect_inputs)


def _training(preset: str, **changes: Any) -> Method:
    return Method(lambda subject, keep, _: trained(subject, keep, preset, **changes).model,
                  trains=True)


def _training_free(subject: Subject, keep: float) -> nn.Module:
    return adacomcat.compress(subject.model, keep_params=keep, calibration=subject.calibration)


def _recovered(subject: Subject, keep: float, minutes: float) -> nn.Module:
    """Recovered on the calibration images, mirrored at random, and as many new collages of them."""
    settings = adacomcat.RecoveryConfig(minutes=minutes, amp=True)
    return adacomcat.recover(_training_free(subject, keep), subject.model,
                             RecoveryBatches(subject.calibration), settings)


class RecoveryBatches:
    """Batches without end, half of them collages; each depends only on how many came before."""

    def __init__(self, images: Tensor, size: int = 16) -> None:
        self.images, self.size, self.count = images, size, 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.count += 1
            generator = torch.Generator().manual_seed(self.count)
            chosen = torch.randint(len(self.images), (self.size // 2,), generator=generator)
            flips = torch.rand(len(chosen), generator=generator) < 0.5
            images = self.images[chosen]
            images[flips] = images[flips].flip(-1)
            yield torch.cat([images, collages(self.images, self.size - len(chosen), self.count)])


METHODS: dict[str, Method] = {
    "plain SVD, no biases (ComCAT)": Method(
        lambda subject, keep, _: cut_products(subject.model, keep, biases=False)),
    "plain SVD, exact biases": Method(
        lambda subject, keep, _: cut_products(subject.model, keep)),
    "ASVD": _matrices(asvd_metric),
    "whitened per matrix (SVD-LLM)": _matrices(svd_llm_metric),
    "AFM": _matrices(afm_metric),
    "whitened per-head QK, VO": Method(
        lambda subject, keep, statistics: cut_products(subject.model, keep, statistics),
        calibrate),
    "ours, training-free": Method(lambda subject, keep, _: _training_free(subject, keep)),
    "ours + 15 minutes of recovery": Method(
        lambda subject, keep, _: _recovered(subject, keep, 15), named=True),
    # With the learning rate of all others, and images to search on that do not judge.
    "ComCAT's search": _training("comcat", search_images="held-out", lr_base=None),
    "Adaptive-ComCAT's search": _training("adaptive-comcat", search_images="held-out",
                                          lr_base=None),
    "ours, searched": _training("adacomcat"),
}


def methods_for(subject: Subject, names: list[str] | None = None) -> dict[str, Method]:
    """The named methods; without names, all that the data allow and that need no naming.

    Raises:
        UserError: a named method trains on labels, and the data have none.
    """
    fitting = {name: method for name, method in METHODS.items()
               if subject.train_set is not None or not method.trains}
    if names is None:
        return {name: method for name, method in fitting.items() if not method.named}
    for name in names:
        if name not in fitting:
            raise UserError(f"{name!r} trains on labels, and these data have none; leave it out")
    return {name: fitting[name] for name in names}
