"""A model and images → statistics of what flows into every projection, in one dense pass."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.factorize.factors import AttentionStatistics, LinearStatistics, factorize_scores
from adacomcat.factorize.linalg import require_finite
from adacomcat.layers.attention import LowRankAttention, low_rank_class
from adacomcat.layers.registry import attention_weights
from adacomcat.sites import Site, find_sites
from adacomcat.utils.model import evaluating
from adacomcat.utils.progress import progress

BATCH = 16
Statistics = dict[str, LinearStatistics | AttentionStatistics]


class Moments:
    """Running first and second moments of (..., M, d) rows; batches are summed up in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        if not self.count:
            self.sum = rows.new_zeros(rows.shape[:-2] + rows.shape[-1:], dtype=torch.float64)
            self.products = self.sum.unsqueeze(-1) * self.sum.unsqueeze(-2)
        self.count += rows.shape[-2]
        self.sum += rows.sum(-2).double()
        self.products += (rows.mT @ rows).double()

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        mean = self.mean
        return self.products / self.count - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def calibration_batches(calibration: Tensor | Iterable, model: nn.Module) -> list[Tensor]:
    """Images as small batches: from one tensor (N, C, H, W) or from an iterable of batches."""
    if isinstance(calibration, Tensor):
        calibration = [calibration]
    parameter = next(model.parameters())
    batches: list[Tensor] = []
    for batch in calibration:
        images = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise UserError("calibration must be a tensor (N, C, H, W) or an iterable of such "
                            f"batches; got {type(images).__name__}")
        require_finite("calibration", images=images)
        batches.extend(images.to(parameter.device, parameter.dtype).split(BATCH))
    if not sum(len(batch) for batch in batches):
        raise UserError("calibration holds no image; give at least one")
    return batches


class LinearCollector:
    def __init__(self) -> None:
        self.moments = Moments()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.moments.add(args[0].detach().flatten(0, -2).float())

    def result(self) -> LinearStatistics:
        m = self.moments
        return LinearStatistics(m.mean, m.covariance, m.count)


class AttentionCollector:
    """Moments of x, of x centred per image, and of each head's attention-averaged tokens."""

    def __init__(self, attn: nn.Module, tier: str) -> None:
        self.inputs, self.keys, self.values = Moments(), Moments(), Moments()
        self.probe = scores_probe(attn, tier)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x, *rest = args
        x = x.detach()
        self.inputs.add(x.flatten(0, 1).float())
        self.keys.add((x - x.mean(1, keepdim=True)).flatten(0, 1).float())
        context = self.probe.score_context(x, *rest, **kwargs)
        averaged = self.probe.average(x, x.unsqueeze(1), *context)  # (B, H, N, d)
        self.values.add(averaged.transpose(0, 1).flatten(1, 2).float())

    def result(self) -> AttentionStatistics:
        keys = self.keys.products / self.keys.count
        return AttentionStatistics(self.inputs.mean, self.inputs.covariance, keys,
                                   self.values.mean, self.values.covariance, self.inputs.count)


def scores_probe(attn: nn.Module, tier: str) -> LowRankAttention:
    """A module that attends exactly as ``attn`` does, over values of any width."""
    weights = attention_weights(attn)
    probe = low_rank_class(attn, tier).like(attn, weights.wq.shape[1], 1)
    if probe.folds_scores:
        probe.set_scores_(factorize_scores(weights.wq, weights.bq, weights.wk, weights.scale))
    return probe.eval()


def collectors(model: nn.Module, sites: list[Site]) -> dict[str, LinearCollector]:
    made: dict[str, LinearCollector | AttentionCollector] = {}
    for site in sites:
        if site.kind == "linear":
            made[site.module] = LinearCollector()
        elif site.kind == "vo":
            made[site.module] = AttentionCollector(model.get_submodule(site.module), site.tier)
    return made


@torch.no_grad()
def calibrate(model: nn.Module, calibration: Tensor | Iterable,
              share: float = 1.0) -> Statistics:
    """Module name → statistics of its inputs, for every module that holds a site.

    ``share``: which part of all images these are; it warns only where all would be too few.
    """
    sites = find_sites(model)
    watching = collectors(model, sites)
    hooks = [model.get_submodule(name).register_forward_pre_hook(collect, with_kwargs=True)
             for name, collect in watching.items()]
    batches = calibration_batches(calibration, model)
    try:
        with evaluating(model):
            for batch in progress(batches, "calibrating"):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    statistics = {name: collect.result() for name, collect in watching.items()
                  if (getattr(collect, "moments", None) or collect.inputs).count}
    _check(statistics, share)
    return statistics


def _check(statistics: Statistics, share: float) -> None:
    thin = []
    for name, found in statistics.items():
        require_finite(name, covariance=found.covariance)
        if found.tokens < share * len(found.mean):
            thin.append(name)
    if thin:
        warnings.warn(f"calibration is thin: fewer tokens than dimensions in {len(thin)} layers "
                      f"({', '.join(thin[:3])} …); covariances are regularised, more images "
                      "would serve better", stacklevel=3)
