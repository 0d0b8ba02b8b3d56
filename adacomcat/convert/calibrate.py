"""A model and images → statistics of what flows into every projection, in one dense pass.

``compress`` and ``inspect`` call it. Images are checked and cut into batches here, once.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

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
from adacomcat.layers.registry import attention_weights, mlp_parts
from adacomcat.sites import Site, find_sites
from adacomcat.utils.inputs import Batch, Inputs, call, inputs_of, shapes
from adacomcat.utils.model import evaluating
from adacomcat.utils.progress import progress

BATCH = 16


class KeptImages:
    """Of a calibration: its images, where they were kept."""

    batches: list[Inputs] | None


Statistics = dict[str, LinearStatistics | AttentionStatistics]


def calibration_batches(images: Tensor | Mapping | Iterable, model: nn.Module,
                        name: str = "calibration") -> list[Inputs]:
    """Images as a user gives them → batches of at most ``BATCH``, on the model's device.

    Public functions that take images call this once; inside the package, images are such batches.

    Args:
        images: what the model takes: a tensor (N, C, H, W), a mapping of its arguments, or an
            iterable of either or of tuples that start with it, as a DataLoader gives them; or a
            data set of Hugging Face. Labels are left out.
        model: whose device and dtype the batches get.
        name: what the user calls these images, for the errors.

    Raises:
        UserError: there is no image, or something else than finite images.
    """
    parameter = next(model.parameters())
    pictures = any(isinstance(module, nn.Conv2d) for module in model.modules())
    batches: list[Inputs] = []
    for given in _batched(images):
        batch = inputs_of(given, model)
        if isinstance(batch, Batch):
            _require_arguments(batch, name)
        elif not isinstance(batch, Tensor) or batch.layout != torch.strided or not (
                batch.ndim == 4 or (batch.ndim > 1 and not pictures)):
            raise UserError(f"{name} must be a tensor (N, C, H, W), a mapping of what the model "
                            f"takes, or an iterable of such batches; got {_described(batch)}")
        else:
            _require_numbers(batch, name, pictures)
        batches.extend(batch.to(parameter.device, _dtype(batch, parameter)).split(BATCH))
    if not sum(len(batch) for batch in batches):
        raise UserError(f"{name} holds no image; give at least one")
    return batches


def _batched(images: Tensor | Mapping | Iterable) -> Iterable:
    if isinstance(images, Tensor | Mapping) or not isinstance(images, Iterable):
        return [images]
    if not hasattr(images, "with_format"):
        return images
    rows: Any = images  # a data set of Hugging Face; a transform of the user's makes tensors
    transformed = getattr(rows, "format", {}).get("type") == "custom"
    return DataLoader(rows if transformed else rows.with_format("torch"), batch_size=BATCH)


def _dtype(batch: Inputs, parameter: Tensor) -> torch.dtype | None:
    """Whole numbers, such as words, keep their type."""
    whole = isinstance(batch, Tensor) and not batch.is_floating_point()
    return None if whole else parameter.dtype


def _require_arguments(batch: Batch, name: str) -> None:
    for key, value in batch.named.items():
        if isinstance(value, Tensor) and value.layout == torch.strided:
            _require_numbers(value, name, pictures=value.ndim == 4)
        elif not (value is None or isinstance(value, bool | int | float)):
            raise UserError(f"{name}: {key} must be a tensor; got {_described(value)}. Leave out "
                            "what the model does not take")
    if not batch.tensors:
        raise UserError(f"{name} must map names of the model's arguments to tensors; got "
                        f"{', '.join(batch.named) or 'nothing'}")


def _require_numbers(batch: Tensor, name: str, pictures: bool) -> None:
    if not batch.is_floating_point() and (pictures or batch.is_complex()):
        raise UserError(f"{name} must hold the images as the model sees them, normalised real "
                        f"numbers; got {batch.dtype}")
    require_finite(name, images=batch)


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
        x = args[0] if args else kwargs["input"]
        self.moments.add(at_least_float32(x.detach().reshape(-1, x.shape[-1])))

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
        seen = self.probe.attended(*args, **kwargs)
        if seen is None:  # queries and keys come from different tokens: weights alone decide
            return
        x, context = seen[0].detach(), seen[1]
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
            made[second_projection(model, site)] = LinearCollector()
        elif site.module not in made:
            made[site.module] = AttentionCollector(model.get_submodule(site.module), site.tier)
    return made


def second_projection(model: nn.Module, site: Site) -> str:
    """The name of the projection behind the hidden neurons of ``site``."""
    parts = mlp_parts(model.get_submodule(site.module))
    assert parts is not None, "find_sites admits known MLPs only"
    return f"{site.module}.{parts.names[1]}"


def calibrate(model: nn.Module, calibration: Tensor | Mapping | Iterable) -> Statistics:
    """Statistics of what flows into every module that holds a site, in one dense pass.

    Args:
        model: the dense model; its mode and its weights stay.
        calibration: images as ``calibration_batches`` takes them.

    Returns:
        Module name → ``LinearStatistics`` or ``AttentionStatistics``: means (d,) and centred
        covariances (d, d) of the tokens, in float64.

    Raises:
        UserError: ``calibration`` holds no image or something else, or an activation is not
            finite.
    """
    return collect_statistics(model, calibration_batches(calibration, model))


@torch.no_grad()
def collect_statistics(model: nn.Module, batches: Sequence[Inputs], share: float = 1.0,
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
                call(model, batch)
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


def require_taken(model: nn.Module, batch: Inputs) -> None:
    """A ``UserError`` where the model itself cannot run on these images."""
    try:
        with evaluating(model):
            call(model, batch)
    except Exception as error:  # whatever a model raises about images
        raise UserError("the model cannot run on calibration images of shape "
                        f"{shapes(batch)}: {reason(error)}") from error


def warn_of_thin(names: list[str]) -> None:
    """Warn where the layers of these names saw fewer tokens than they have inputs."""
    if names:
        warnings.warn(f"calibration is thin: fewer tokens than dimensions in {len(names)} layers "
                      f"({', '.join(names[:3])} …); covariances are regularised, more images "
                      "would serve better", stacklevel=3)
