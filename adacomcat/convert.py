"""A plan and a model → the compressed model."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from adacomcat.attention import attention_weights, low_rank_class
from adacomcat.calibrate import BATCH, Statistics, calibrate, calibration_batches
from adacomcat.decompositions import truncation_errors
from adacomcat.errors import UserError
from adacomcat.factorize import (
    LinearFactors,
    LinearStatistics,
    ScoreFactors,
    ValueFactors,
    factorize_linear,
    factorize_scores,
    factorize_values,
    linear_spectrum,
    require_finite,
    score_spectrum,
    value_spectrum,
)
from adacomcat.hidden import HiddenFactors, factorize_hidden, narrow, narrowed
from adacomcat.layers import LowRankLinear, LowRankMlp
from adacomcat.plan import RankPlan
from adacomcat.sequential import compress_blocks_, sequential_blocks
from adacomcat.sites import DENSE, MULTIPLE, Site, find_sites, narrowable_mlps
from adacomcat.workers import one_by_one, side_by_side

SiteFactors = LinearFactors | ScoreFactors | ValueFactors | HiddenFactors
Factors = dict[str, SiteFactors]

# Shrinkage of every whitening covariance; measured on DINOv2 ViT-S (examples/dinov2).
SHRINKAGE = 0.1

# Images that measure the error curves of a model whose blocks are then fitted to all images.
ALLOCATION_IMAGES = 64

BLOCKS = "blocks."  # how the names begin of what is fitted in sequence


class Decomposition(NamedTuple):
    """What to make of each kind of site; the three take the same arguments at a site."""

    linear: Callable
    scores: Callable
    values: Callable


FACTORS = Decomposition(factorize_linear, factorize_scores, factorize_values)
SPECTRA = Decomposition(linear_spectrum, score_spectrum, value_spectrum)


def factorize_site(model: nn.Module, site: Site, statistics: Statistics,
                   shrinkage: float = SHRINKAGE) -> SiteFactors:
    """Full-rank nested factors of one site."""
    return decompose_site(FACTORS, model, site, statistics, shrinkage)


def decompose_site(make: Decomposition, model: nn.Module, site: Site, statistics: Statistics,
                   shrinkage: float) -> Any:
    module = model.get_submodule(site.module)
    require_finite(site.module, **{name.replace(".", "_"): p for name, p in
                                   module.named_parameters()})
    if site.kind == "hidden":
        found = statistics.get(f"{site.module}.fc2")
        if found is None:
            raise UserError(f"{site.name}: only activations tell which neurons can go; give "
                            "calibration images")
        return factorize_hidden(*_weight_and_bias(module.fc2), found)
    found = statistics.get(site.module)
    if site.kind == "linear":
        return make.linear(*_weight_and_bias(module), _for_linear(found, site),
                           shrinkage=shrinkage)
    weights = attention_weights(module)
    if site.kind == "qk":
        return make.scores(weights.wq, weights.bq, weights.wk, module.scale, found,
                           shrinkage=shrinkage)
    if site.kind == "vo":
        return make.values(weights.wv, weights.bv, weights.wo, weights.bo, found,
                           shrinkage=shrinkage)
    weight, bias = ((weights.wq, weights.bq) if site.kind == "q" else (weights.wk, weights.bk))
    return make.linear(weight.flatten(0, 1), bias.flatten(), _for_linear(found, site),
                       shrinkage=shrinkage)


def decompose_sites(make: Decomposition, model: nn.Module, sites: list[Site],
                    statistics: Statistics, shrinkage: float, label: str) -> list[Any]:
    """``decompose_site`` of each; on a CPU one site on each core."""
    def decompose(site: Site) -> Any:
        return decompose_site(make, model, site, statistics, shrinkage)

    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return (side_by_side if on_cpu else one_by_one)(decompose, sites, label)


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


def _for_linear(found: object | None, site: Site) -> LinearStatistics | None:
    """Without a bias to absorb the mean error, the mean belongs to the metric."""
    if found is None:
        return None
    if site.bias:
        return LinearStatistics(found.mean, found.covariance, found.tokens)
    moment = found.covariance + torch.outer(found.mean, found.mean)
    return LinearStatistics(torch.zeros_like(found.mean), moment, found.tokens)


def factorize_model(model: nn.Module, statistics: Statistics | None = None,
                    shrinkage: float = SHRINKAGE, sites: list[Site] | None = None) -> Factors:
    """Site name → full-rank nested factors, for every site."""
    sites = find_sites(model) if sites is None else sites
    factors = decompose_sites(FACTORS, model, sites, statistics or {}, shrinkage, "factorising")
    return {site.name: made for site, made in zip(sites, factors, strict=True)}


def build_skeleton(model: nn.Module, plan: RankPlan) -> nn.Module:
    """In place: low-rank modules of the plan's shapes, their factors not yet filled."""
    return _swap(model, plan, lambda module, sites: skeleton_module(module, sites, plan))


@torch.no_grad()
def install_(model: nn.Module, plan: RankPlan, factors: Factors) -> nn.Module:
    """In place: replace what the plan names, with these factors cut to its ranks."""
    return _swap(model, plan, lambda module, sites: low_rank_module(module, sites, plan, factors))


def _swap(model: nn.Module, plan: RankPlan, make: Callable) -> nn.Module:
    for name, group in groupby(plan.validate(model), key=lambda site: site.module):
        sites = list(group)
        if any(plan[site.name] != DENSE for site in sites):
            model.set_submodule(name, make(model.get_submodule(name), sites))
    join_mlps_(model)
    model.rank_plan = plan
    return model


def low_rank_module(module: nn.Module, sites: list[Site], plan: RankPlan,
                    factors: Factors) -> nn.Module:
    """The drop-in for one dense module, filled. ``sites``: those of this module that shrink."""
    if sites[0].kind == "hidden":
        return narrowed(module, *factors[sites[0].name].narrowed(plan[sites[0].name]))
    replacement = skeleton_module(module, sites, plan)
    if isinstance(replacement, LowRankLinear):
        replacement.set_(factors[sites[0].name])
        return replacement
    prefix = sites[0].module
    if hasattr(replacement, "wq"):
        replacement.set_scores_(factors[f"{prefix}.qk"])
    for part in "qk":
        if isinstance(projection := getattr(replacement, part, None), LowRankLinear):
            projection.set_(factors[f"{prefix}.{part}"])
    replacement.set_values_(factors[f"{prefix}.vo"])
    return replacement


def skeleton_module(module: nn.Module, sites: list[Site], plan: RankPlan) -> nn.Module:
    """The drop-in for one dense module, its factors not yet filled."""
    site, prefix = sites[0], sites[0].module
    if site.kind == "linear":
        return LowRankLinear.like(module, plan[site.name])
    if site.kind == "hidden":
        return narrow(module, plan[site.name])

    def folded(part: str) -> int:
        rank = plan[f"{prefix}.{part}"]
        return site.head_dim if rank == DENSE else rank

    attention = low_rank_class(module, site.tier).like(module, folded("qk"), folded("vo"))
    for part in "qk":
        rank = plan[f"{prefix}.{part}"]
        if site.tier == "B" and rank != DENSE:
            setattr(attention, part, LowRankLinear.like(getattr(attention, part), rank))
    return attention


def join_mlps_(model: nn.Module) -> None:
    """An MLP whose two projections are low-rank runs as one op."""
    for name, module in list(model.named_modules()):
        low_rank = type(module) is Mlp and all(
            isinstance(part, LowRankLinear) for part in (module.fc1, module.fc2))
        if low_rank and isinstance(module.norm, nn.Identity):
            joined = LowRankMlp(module.fc1, module.act, module.fc2, module.drop1.p)
            model.set_submodule(name, joined.train(module.training))


def compress(model: nn.Module, *, keep_params: float | None = None,
             keep_macs: float | None = None, max_latency_ms: float | None = None,
             plan: RankPlan | None = None, calibration: Tensor | Iterable | None = None,
             multiple: int = MULTIPLE, latency_batch: int = 1, refine: int = 0,
             refine_images: Tensor | Iterable | None = None) -> nn.Module:
    """A compressed copy of ``model``, training-free.

    keep_params, keep_macs: fraction of the whole model's parameters or multiply-accumulates to
    keep, in (0, 1]; or max_latency_ms: milliseconds for ``latency_batch`` images, measured on this
    machine with its threads as they are set, of ``adacomcat.optimize`` of the result where the CPU
    kernels are built; or a ``plan`` of your own. calibration: images (N, C, H, W), or an iterable
    of batches, as the model sees them; without it the decomposition is data-free. multiple: the
    step of ranks per head (twice that elsewhere), halved where a fraction cannot be reached
    otherwise. refine: so many more plans at the budget are tried; one is kept where it keeps closer
    to the dense model on images that its factors do not know: the second half of ``refine_images``,
    else of ``calibration``. Give them where images of the two halves would share a picture.
    """
    return compress_(copy.deepcopy(model), keep_params=keep_params, keep_macs=keep_macs,
                     max_latency_ms=max_latency_ms, plan=plan, calibration=calibration,
                     multiple=multiple, latency_batch=latency_batch, refine=refine,
                     refine_images=refine_images)


def compress_(model: nn.Module, *, keep_params: float | None = None,
              keep_macs: float | None = None, max_latency_ms: float | None = None,
              plan: RankPlan | None = None, calibration: Tensor | Iterable | None = None,
              multiple: int = MULTIPLE, latency_batch: int = 1, refine: int = 0,
              refine_images: Tensor | Iterable | None = None) -> nn.Module:
    """``compress`` in place."""
    budgets = (keep_params, keep_macs, max_latency_ms, plan)
    if sum(choice is not None for choice in budgets) != 1:
        raise UserError("say exactly one of keep_params, keep_macs, max_latency_ms and plan")
    if refine and (plan is not None or calibration is None):
        raise UserError("refine tries plans at a budget and judges them by images: give both, and "
                        "no plan")
    require_finite_model(model)
    batches = None if calibration is None else calibration_batches(calibration, model)
    refined = None
    if plan is not None:
        factors = _factors(model, _not_in_sequence(model, plan.validate(model), batches), batches)
    else:  # which neurons may go, only activations tell
        sites = find_sites(model, () if batches is None else narrowable_mlps(model))
        budget = _budget(model, keep_params, keep_macs, max_latency_ms, multiple, latency_batch)
        # Allocation scores candidates by converting: it is imported late.
        if refine:
            from adacomcat.refine import refined_on_images
            images = batches if refine_images is None else calibration_batches(refine_images, model)
            refined = refined_on_images(model, sites, budget, images, refine)
            plan = refined.plan
            factors = _factors(model, _not_in_sequence(model, sites, batches), batches)
        else:
            from adacomcat.allocate import error_weights
            factors = _factors(model, sites, batches)
            plan = budget(factors, sites)(error_weights(model, factors, batches, sites))
    convert_(model, plan, factors, batches)
    model.refinement = refined
    return model


def _budget(model: nn.Module, keep_params: float | None, keep_macs: float | None,
            max_latency_ms: float | None, multiple: int, latency_batch: int) -> Callable:
    """(factors, sites) → the ``Allocate`` of this budget."""
    from adacomcat.allocate import allocator
    from adacomcat.latency_budget import latency_allocator
    if max_latency_ms is not None:
        return partial(latency_allocator, model, max_latency_ms=max_latency_ms,
                       batch=latency_batch, multiple=multiple)
    return partial(allocator, model, keep_params=keep_params, keep_macs=keep_macs,
                   multiple=multiple)


def _factors(model: nn.Module, sites: list[Site], batches: list[Tensor] | None) -> Factors:
    return factorize_model(model, model_statistics(model, batches), sites=sites) if sites else {}


def _not_in_sequence(model: nn.Module, sites: list[Site],
                     batches: list[Tensor] | None) -> list[Site]:
    """Those that ``convert_`` takes factors for: it fits blocks in sequence itself."""
    if batches is None or not sequential_blocks(model):
        return sites
    return [site for site in sites if not site.name.startswith(BLOCKS)]


def model_statistics(model: nn.Module, batches: list[Tensor] | None) -> Statistics:
    """Statistics of the dense model. Where the blocks will be fitted one after the other, they
    only serve the allocation, and a part of the images is enough."""
    if batches is None:
        return {}
    few = batches[:ALLOCATION_IMAGES // BATCH] if sequential_blocks(model) else batches
    return calibrate(model, few, share=len(few) / len(batches))


def convert_(model: nn.Module, plan: RankPlan, factors: Factors,
             calibration: Tensor | Iterable | None = None) -> nn.Module:
    """In place, at a given plan: block by block where the model allows it, else site by site."""
    if calibration is None or not sequential_blocks(model):
        return install_(model, plan, factors)
    compress_blocks_(model, plan, calibration, SHRINKAGE)
    outside = {name: rank for name, rank in plan.ranks.items() if not name.startswith(BLOCKS)}
    install_(model, RankPlan(outside), factors)
    model.rank_plan = plan
    return model


def require_finite_model(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        require_finite(name.rpartition(".")[0] or name, **{name.rpartition(".")[2]: parameter})
