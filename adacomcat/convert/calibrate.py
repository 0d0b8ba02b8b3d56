"""A model and images → statistics of what flows into every projection, in one dense pass.

``compress`` and ``inspect`` call it. Images are checked and cut into batches here, once.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adacomcat.convert.moments import (
    AveragedTokens,
    Moments,
    TokenMoments,
    at_least_float32,
    averaged_values,
)
from adacomcat.errors import UserError, reason
from adacomcat.factorize.factors import AttentionStatistics, LinearStatistics, factorize_scores
from adacomcat.factorize.linalg import require_finite
from adacomcat.layers.attention import LowRankAttention, low_rank_class
from adacomcat.layers.registry import attention_weights
from adacomcat.sites import Site, find_sites
from adacomcat.utils.model import evaluating
from adacomcat.utils.progress import progress

BATCH = 16
Statistics = dict[str, LinearStatistics | AttentionStatistics]


def calibration_batches(images: Tensor | Iterable, model: nn.Module,
                        name: str = "calibration") -> list[Tensor]:
    """Images as a user gives them → batches of at most ``BATCH``, on the model's device.

    Public functions that take images call this once; inside the package, images are such batches.

    Args:
        images: one tensor (N, C, H, W), or an iterable of such tensors or of tuples that start
            with one, as a DataLoader gives them.
        model: whose device and dtype the batches get.
        name: what the user calls these images, for the errors.

    Raises:
        UserError: there is no image, or something else than finite images.
    """
    if isinstance(images, Tensor) or not isinstance(images, Iterable):
        images = [images]
    parameter = next(model.parameters())
    batches: list[Tensor] = []
    for given in images:
        batch = given[0] if isinstance(given, list | tuple) else given
        if not isinstance(batch, Tensor) or batch.layout != torch.strided or batch.ndim != 4:
            raise UserError(f"{name} must be a tensor (N, C, H, W) or an iterable of such "
                            f"batches; got {_described(batch)}")
        if not batch.is_floating_point():
            raise UserError(f"{name} must hold the images as the model sees them, normalised real "
                            f"numbers; got {batch.dtype}")
        require_finite(name, images=batch)
        batches.extend(batch.to(parameter.device, parameter.dtype).split(BATCH))
    if not sum(len(batch) for batch in batches):
        raise UserError(f"{name} holds no image; give at least one")
    return batches


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = str(value.layout).removeprefix("torch.")
    return f"a {layout} tensor of {value.ndim} dimensions"


class LinearCollector:
    """Moments of the rows that enter a linear layer."""

    def __init__(self) -> None:
        self.moments = Moments()

    @property
    def count(self) -> int:
        return self.moments.count

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.moments.add(at_least_float32(args[0].detach().flatten(0, -2)))

    def result(self) -> LinearStatistics:
        m = self.moments
        return LinearStatistics(m.mean, m.covariance, m.count)


class AttentionCollector:
    """Moments of x, of x centred per image, and of what each head averages."""

    def __init__(self, attn: nn.Module, tier: str) -> None:
        self.probe, self.wv = scores_probe(attn, tier), attention_weights(attn).wv
        self.tokens, self.averaged, self.values = TokenMoments(), AveragedTokens(self.wv), Moments()

    @property
    def count(self) -> int:
        return self.values.count

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x, *rest = args
        x = x.detach()
        context = self.probe.score_context(x, *rest, **kwargs)
        values = averaged_values(self.probe, x, self.wv, context)
        self.tokens.add(x)
        self.averaged.add(self.probe, x, context)
        self.values.add(at_least_float32(values.flatten(0, 1)))

    def result(self) -> AttentionStatistics:
        tokens, values = self.tokens.tokens, self.values
        covariance = tokens.covariance
        return AttentionStatistics(tokens.mean, covariance, self.tokens.key_covariance(covariance),
                                   self.averaged.mean(values.mean), values.covariance,
                                   self.averaged.variance, tokens.count)


def scores_probe(attn: nn.Module, tier: str) -> LowRankAttention:
    """A module that attends exactly as ``attn`` does, over values of any width."""
    weights = attention_weights(attn)
    probe = low_rank_class(attn, tier).like(attn, weights.wq.shape[1], 1)
    if probe.folds_scores:
        probe.set_scores_(factorize_scores(weights.wq, weights.bq, weights.wk, weights.scale))
    return probe.eval()


Collector = LinearCollector | AttentionCollector


def collectors(model: nn.Module, sites: list[Site]) -> dict[str, Collector]:
    """Module name → what collects its inputs, for every module that ``sites`` ask about."""
    made: dict[str, Collector] = {}
    for site in sites:
        if site.kind == "linear":
            made[site.module] = LinearCollector()
        elif site.kind == "hidden":
            made[f"{site.module}.fc2"] = LinearCollector()
        elif site.module not in made:
            made[site.module] = AttentionCollector(model.get_submodule(site.module), site.tier)
    return made


def calibrate(model: nn.Module, calibration: Tensor | Iterable) -> Statistics:
    """Statistics of what flows into every module that holds a site, in one dense pass.

    Args:
        model: the dense model; its mode and its weights stay.
        calibration: images (N, C, H, W) as the model sees them, or an iterable of batches.

    Returns:
        Module name → ``LinearStatistics`` or ``AttentionStatistics``: means (d,) and centred
        covariances (d, d) of the tokens, in float64.

    Raises:
        UserError: ``calibration`` holds no image or something else, or an activation is not
            finite.
    """
    return collect_statistics(model, calibration_batches(calibration, model))


@torch.no_grad()
def collect_statistics(model: nn.Module, batches: list[Tensor], share: float = 1.0,
                       sites: list[Site] | None = None) -> Statistics:
    """``calibrate`` for batches that are checked.

    Args:
        share: the part that these images are of all that the caller has. The warning of too few
            images comes only where all of them would be too few.
        sites: what the statistics are for; every rank of ``model`` where not given.
    """
    try:
        with (watched(model, find_sites(model) if sites is None else sites) as watching,
              evaluating(model)):
            for batch in progress(batches, "calibrating"):
                model(batch)
    except Exception:
        require_taken(model, batch)
        raise
    statistics = collected(watching)
    warn_of_thin([name for name, found in statistics.items()
                  if found.tokens < share * len(found.mean)])
    return statistics


@contextmanager
def watched(model: nn.Module, sites: list[Site]) -> Iterator[dict[str, Collector]]:
    """Inside, collectors see what enters the modules that ``sites`` ask about."""
    watching = collectors(model, sites)
    hooks = [model.get_submodule(name).register_forward_pre_hook(collect, with_kwargs=True)
             for name, collect in watching.items()]
    try:
        yield watching
    finally:
        for hook in hooks:
            hook.remove()


def collected(watching: dict[str, Collector]) -> Statistics:
    """The results of those collectors that saw tokens, all finite; each is freed at its turn.

    Raises:
        UserError: an activation is not finite.
    """
    statistics: Statistics = {}
    for name in list(watching):
        collect = watching.pop(name)
        if collect.count:
            statistics[name] = found = collect.result()
            require_finite(name, covariance=found.covariance)
    return statistics


def require_taken(model: nn.Module, batch: Tensor) -> None:
    """A ``UserError`` where the model itself cannot run on these images."""
    try:
        with evaluating(model):
            model(batch)
    except Exception as error:  # whatever a model raises about images
        raise UserError("the model cannot run on calibration images of shape "
                        f"{tuple(batch.shape[1:])}: {reason(error)}") from error


def warn_of_thin(names: list[str]) -> None:
    """Warn where the layers of these names saw fewer tokens than they have inputs."""
    if names:
        warnings.warn(f"calibration is thin: fewer tokens than dimensions in {len(names)} layers "
                      f"({', '.join(names[:3])} …); covariances are regularised, more images "
                      "would serve better", stacklevel=3)
