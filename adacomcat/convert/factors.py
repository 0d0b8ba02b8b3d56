"""Factors of every site, or only what truncation would cost: weights and statistics decomposed.

The allocation reads the error curves, the surgery cuts the factors to a plan's ranks.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adacomcat.convert.calibrate import Statistics, second_projection
from adacomcat.errors import UserError
from adacomcat.factorize.factors import (
    AttentionStatistics,
    LinearFactors,
    LinearStatistics,
    ScoreFactors,
    ValueFactors,
    factorize_linear,
    factorize_scores,
    factorize_values,
    linear_spectrum,
    score_spectrum,
    value_spectrum,
)
from adacomcat.factorize.linalg import require_finite
from adacomcat.factorize.nested import NestedNeurons
from adacomcat.factorize.neurons import NeuronFactors, factorize_neurons
from adacomcat.layers.registry import attention_weights
from adacomcat.ops.decompositions import truncation_errors
from adacomcat.sites import Site, find_sites
from adacomcat.utils.parallel_map import one_by_one, side_by_side


class ErrorCurve(NamedTuple):
    """What an allocation reads of factors that nobody keeps."""

    errors: Tensor  # (R + 1,)


SiteFactors = (LinearFactors | ScoreFactors | ValueFactors | NeuronFactors | ErrorCurve
               | NestedNeurons)
Factors = Mapping[str, SiteFactors]

# Shrinkage of every whitening covariance; measured on DINOv2 ViT-S (examples/dinov2).
SHRINKAGE = 0.1


FEW_SITES = 4


class Decomposition(NamedTuple):
    """What to make of each kind of site: factors, or spectra alone. Both take the same arguments.
    """

    linear: Callable[..., Any]
    scores: Callable[..., Any]
    values: Callable[..., Any]
    neurons: Callable[..., Any] = factorize_neurons


FACTORS = Decomposition(factorize_linear, factorize_scores, factorize_values)
SPECTRA = Decomposition(linear_spectrum, score_spectrum, value_spectrum)


def _blank_linear(weight: Tensor, *rest: Any, **settings: Any) -> LinearFactors:
    outputs, inputs = weight.shape
    rank, zeros = min(weight.shape), weight.new_zeros
    return LinearFactors(zeros(inputs, rank), zeros(outputs, rank), zeros(outputs), zeros(inputs),
                         zeros(rank + 1))


def _blank_scores(wq: Tensor, bq: Tensor, wk: Tensor, *rest: Any, **settings: Any) -> ScoreFactors:
    zeros = torch.zeros_like
    return ScoreFactors(zeros(wq), zeros(wq[..., 0]), zeros(wk), wq.new_zeros(wq.shape[1] + 1))


def _blank_values(wv: Tensor, bv: Tensor, wo: Tensor, bo: Tensor, *rest: Any, **settings: Any
                  ) -> ValueFactors:
    zeros = torch.zeros_like
    return ValueFactors(zeros(wv), zeros(wo), zeros(bo), zeros(wv[:, 0]),
                        wv.new_zeros(wv.shape[1] + 1))


def _blank_neurons(weight: Tensor, *rest: Any) -> NeuronFactors:
    outputs, hidden = weight.shape
    zeros = weight.new_zeros
    return NeuronFactors(torch.arange(hidden, device=weight.device), zeros(outputs, hidden),
                         zeros(outputs), zeros(hidden), torch.eye(hidden, device=weight.device),
                         zeros(hidden + 1))


BLANK = Decomposition(_blank_linear, _blank_scores, _blank_values, _blank_neurons)


def decompose_site(make: Decomposition, model: nn.Module, site: Site, statistics: Statistics,
                   shrinkage: float) -> Any:
    """What ``make`` makes of one site, in float64.

    Raises:
        UserError: a weight is not finite, or neurons are to be chosen without statistics.
    """
    module: Any = model.get_submodule(site.module)
    if make is not BLANK:
        require_finite(site.module, **{name.replace(".", "_"): p for name, p in
                                       module.named_parameters()})
    if site.kind == "hidden":
        return _neurons(make, model, site, statistics)
    found = statistics.get(site.module)
    if site.kind == "linear":
        weight, bias = _weight_and_bias(module)
        return make.linear(weight, bias, _for_linear(found, site), shrinkage=shrinkage)
    weights = attention_weights(module)
    if site.kind == "qk":
        return make.scores(weights.wq, weights.bq, weights.wk, weights.scale, found,
                           shrinkage=shrinkage)
    if site.kind == "vo":
        return make.values(weights.wv, weights.bv, weights.wo, weights.bo, found,
                           shrinkage=shrinkage)
    weight, bias = ((weights.wq, weights.bq) if site.kind == "q" else (weights.wk, weights.bk))
    return make.linear(weight.flatten(0, 1), bias.flatten(), _for_linear(found, site),
                       shrinkage=shrinkage)


def _neurons(make: Decomposition, model: nn.Module, site: Site,
             statistics: Statistics) -> NeuronFactors:
    name = second_projection(model, site)
    fc2: Any = model.get_submodule(name)
    found = statistics.get(name)
    if not isinstance(found, LinearStatistics) and make is not BLANK:
        raise UserError(f"{site.name}: only activations tell which neurons can go; give "
                        "calibration images")
    return make.neurons(*_weight_and_bias(fc2), found)


def decompose_sites(make: Decomposition, model: nn.Module, sites: list[Site],
                    statistics: Statistics, shrinkage: float, label: str) -> list[Any]:
    """``decompose_site`` of every site, on a CPU one site on each core.

    The few sites of one block go one after the other: most of their time is large products.
    """
    def decompose(site: Site) -> Any:
        return decompose_site(make, model, site, statistics, shrinkage)

    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    many = len(sites) > FEW_SITES
    return (side_by_side if on_cpu and many else one_by_one)(decompose, sites, label)


@torch.no_grad()
def error_curves(model: nn.Module, statistics: Statistics | None = None,
                 shrinkage: float = SHRINKAGE) -> dict[str, Tensor]:
    """Site name → squared error of every rank, (R + 1,), without factors: spectra are enough."""
    sites = find_sites(model)
    spectra = decompose_sites(SPECTRA, model, sites, statistics or {}, shrinkage, "scoring")
    curves = {}
    for shape in {spectrum.shape for spectrum in spectra}:
        alike = [i for i, spectrum in enumerate(spectra) if spectrum.shape == shape]
        errors = truncation_errors(torch.stack([spectra[i] for i in alike]))
        curves |= {sites[i].name: curve for i, curve in zip(alike, errors, strict=True)}
    return curves


def _weight_and_bias(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


def _for_linear(found: LinearStatistics | AttentionStatistics | None,
                site: Site) -> LinearStatistics | None:
    """Statistics of what enters one projection."""
    if found is None:
        return None
    entering = LinearStatistics(found.mean, found.covariance, found.tokens)
    return entering if site.bias else entering.about_zero()


def factorize_model(model: nn.Module, statistics: Statistics | None = None,
                    shrinkage: float = SHRINKAGE, sites: list[Site] | None = None) -> Factors:
    """Full-rank nested factors of every site: rank r is their first r columns.

    Args:
        model: the dense model.
        statistics: what ``calibrate`` gave; without them every input direction counts alike.
        shrinkage: λ of every covariance C + λ m I, m the mean of C's diagonal.
        sites: the sites to factorise; every rank of ``model`` where not given. An attention folds
            as a whole, so both its folded sites are factorised where one is named.

    Returns:
        Site name → factors with ``errors``, the squared error of every rank.

    Raises:
        UserError: a weight is not finite, or neurons are to be chosen without statistics.
    """
    sites = find_sites(model) if sites is None else _whole_attentions(model, sites)
    factors = decompose_sites(FACTORS, model, sites, statistics or {}, shrinkage, "factorising")
    return {site.name: made for site, made in zip(sites, factors, strict=True)}


def blank_factors(model: nn.Module, sites: list[Site]) -> Factors:
    """Factors as ``factorize_model`` gives them, of zeros; they take their values from a state."""
    sites = _whole_attentions(model, sites)
    made = decompose_sites(BLANK, model, sites, {}, SHRINKAGE, "resuming")
    return {site.name: factors for site, factors in zip(sites, made, strict=True)}


def _whole_attentions(model: nn.Module, sites: list[Site]) -> list[Site]:
    """``sites``, and the folded sites that they leave out of their own attentions."""
    named = {site.name for site in sites}
    attentions = {site.module for site in sites if site.tier in ("A", "B")}
    return [*sites, *(site for site in find_sites(model) if site.folded
                      and site.module in attentions and site.name not in named)]


def require_finite_model(model: nn.Module) -> None:
    """A ``UserError`` that names the first parameter with NaN or infinite values."""
    for name, parameter in model.named_parameters():
        require_finite(name.rpartition(".")[0] or name, **{name.rpartition(".")[2]: parameter})
