"""A model and images → statistics of what flows into every projection, in one dense pass.

``compress`` and ``inspect`` call it. Images are checked and cut into batches here, once.
"""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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


# Rounding of float32 leaves constant features about this variance, relative to their square.
ROUNDING = 1e-10
SHIFT_ROWS = 256  # rows that tell roughly where the mean of all lies


class Moments:
    """Running moments of (..., M, d) rows, of float32 or float64; batches are summed up in float64.

    Products are those of the rows minus about the first batch's mean. The variance of features
    whose mean is large, or which never change, would else drown in rounding.
    """

    shift: Tensor  # (..., d), from the first ``add`` on, as all below
    sum: Tensor  # (..., d) of the shifted rows
    products: Tensor  # (..., d, d) sums of their outer products

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor) -> Tensor:
        """Returns the shifted rows."""
        if not self.count:
            few = rows[..., ::max(1, rows.shape[-2] // SHIFT_ROWS), :]
            self.shift = few.mean(-2, dtype=torch.float64).to(rows.dtype)
            self.sum = torch.zeros_like(self.shift, dtype=torch.float64)
            self.products = self.sum.unsqueeze(-1) * self.sum.unsqueeze(-2)
        self.count += rows.shape[-2]
        rows = rows - self.shift.unsqueeze(-2)
        self.sum += rows.sum(-2).double()
        self.products += (rows.mT @ rows).double()
        return rows

    def of(self, features: Tensor) -> "Moments":
        """The moments of these features alone, of (M, d) rows."""
        part = Moments()
        part.count, part.shift, part.sum = self.count, self.shift[features], self.sum[features]
        part.products = self.products[features][:, features]
        return part

    @property
    def mean(self) -> Tensor:
        return self.shift.double() + self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Every feature has at least the variance that rounding gives it."""
        mean, rest = self.mean, self.sum / self.count
        covariance = self.products / self.count - rest.unsqueeze(-1) * rest.unsqueeze(-2)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        variance.clamp_min_(0).add_(ROUNDING * mean.square())
        return covariance

    @property
    def moment(self) -> Tensor:
        """The second moment about zero."""
        mean = self.mean
        return self.covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)


def at_least_float32(rows: Tensor) -> Tensor:
    """Sums of bfloat16 and float16 would round away what they are made for."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


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
    """Moments of x, of x centred per image, and of each head's attention-averaged tokens."""

    def __init__(self, attn: nn.Module, tier: str) -> None:
        self.inputs, self.keys, self.values = Moments(), Moments(), Moments()
        self.probe = scores_probe(attn, tier)

    @property
    def count(self) -> int:
        return self.inputs.count

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x, *rest = args
        tokens = at_least_float32(x.detach())
        self.inputs.add(tokens.flatten(0, 1))
        self.keys.add((tokens - tokens.mean(1, keepdim=True)).flatten(0, 1))
        context = self.probe.score_context(x, *rest, **kwargs)
        averaged = self.probe.average(x.detach(), x.detach().unsqueeze(1), *context)  # (B, H, N, d)
        self.values.add(at_least_float32(averaged.transpose(0, 1).flatten(1, 2)))

    def result(self) -> AttentionStatistics:
        return AttentionStatistics(self.inputs.mean, self.inputs.covariance, self.keys.moment,
                                   self.values.mean, self.values.covariance, self.inputs.count)


def scores_probe(attn: nn.Module, tier: str) -> LowRankAttention:
    """A module that attends exactly as ``attn`` does, over values of any width."""
    weights = attention_weights(attn)
    probe = low_rank_class(attn, tier).like(attn, weights.wq.shape[1], 1)
    if probe.folds_scores:
        probe.set_scores_(factorize_scores(weights.wq, weights.bq, weights.wk, weights.scale))
    return probe.eval()


Collector = LinearCollector | AttentionCollector


def collectors(model: nn.Module, sites: list[Site]) -> dict[str, Collector]:
    """Module name → what collects its inputs, for every module that holds one of ``sites``."""
    made: dict[str, Collector] = {}
    for site in sites:
        if site.kind == "linear":
            made[site.module] = LinearCollector()
        elif site.kind == "vo":
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
def collect_statistics(model: nn.Module, batches: list[Tensor], share: float = 1.0) -> Statistics:
    """``calibrate`` for batches that are checked.

    share: the part that these images are of all that the caller has. The warning of too few images
    comes only where all of them would be too few.
    """
    watching = collectors(model, find_sites(model))
    hooks = [model.get_submodule(name).register_forward_pre_hook(collect, with_kwargs=True)
             for name, collect in watching.items()]
    try:
        with evaluating(model):
            for batch in progress(batches, "calibrating"):
                model(batch)
    except Exception:
        _remove(hooks)
        _require_taken(model, batch)
        raise
    finally:
        _remove(hooks)
    statistics: Statistics = {name: collect.result() for name, collect in watching.items()
                              if collect.count}
    _check(statistics, share)
    return statistics


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _require_taken(model: nn.Module, batch: Tensor) -> None:
    """A ``UserError`` where the model itself cannot run on these images."""
    try:
        with evaluating(model):
            model(batch)
    except Exception as error:  # whatever a model raises about images
        raise UserError("the model cannot run on calibration images of shape "
                        f"{tuple(batch.shape[1:])}: {reason(error)}") from error


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
