"""A plan and a model → the compressed model."""

import copy
from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn

from adacomcat.convert.calibrate import calibration_batches
from adacomcat.convert.factors import Factors, factorize_model, require_finite_model
from adacomcat.convert.model import BLOCKS, convert_, model_statistics
from adacomcat.convert.sequential import sequential_blocks
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import MULTIPLE, Site, find_sites, prunable_mlps


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
        sites = find_sites(model, () if batches is None else prunable_mlps(model))
        budget = _budget(model, keep_params, keep_macs, max_latency_ms, multiple, latency_batch)
        # Allocation scores candidates by converting: it is imported late.
        if refine:
            from adacomcat.allocation.refine import refined_on_images
            images = batches if refine_images is None else calibration_batches(refine_images, model)
            refined = refined_on_images(model, sites, budget, images, refine)
            plan = refined.plan
            factors = _factors(model, _not_in_sequence(model, sites, batches), batches)
        else:
            from adacomcat.allocation.sensitivity import error_weights
            factors = _factors(model, sites, batches)
            plan = budget(factors, sites)(error_weights(model, factors, batches, sites))
    convert_(model, plan, factors, batches)
    model.refinement = refined
    return model


def _budget(model: nn.Module, keep_params: float | None, keep_macs: float | None,
            max_latency_ms: float | None, multiple: int, latency_batch: int) -> Callable:
    """(factors, sites) → the ``Allocate`` of this budget."""
    from adacomcat.allocation.budget import allocator
    from adacomcat.allocation.latency import latency_allocator
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
