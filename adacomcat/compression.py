"""Compression without training, every step in order: ``compress_`` calls them from top to bottom.

    images    checked and cut into batches                                convert.calibrate
    sites     where a rank or a number of neurons is chosen               sites
    factors   of every site, whitened by what the images show             convert.factors
    plan      within the budget, and refined where asked                  allocation
    model     every site replaced, blocks fitted in sequence              convert.model
    numbers   on few bits where asked                                     quantization
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from adacomcat.allocation.bits import float_dtype
from adacomcat.allocation.budget import Budget, Kind
from adacomcat.allocation.refine import refined_on_images
from adacomcat.allocation.survey import survey
from adacomcat.calibration import Calibration, calibrate
from adacomcat.convert.calibrate import calibration_batches
from adacomcat.convert.factors import Factors, factorize_model, require_finite_model
from adacomcat.convert.model import convert_, model_statistics
from adacomcat.convert.quantized import require_not_quantized
from adacomcat.convert.record import Refined, compression_of, record_
from adacomcat.convert.sequential import in_sequence, sequential_blocks
from adacomcat.errors import UserError
from adacomcat.plan import HIDDEN, RankPlan
from adacomcat.quantization.model import bits_of, quantized_
from adacomcat.sites import (
    DENSE,
    MULTIPLE,
    Filters,
    Site,
    altered_layers,
    find_sites,
    prunable_mlps,
)
from adacomcat.utils.inputs import Inputs
from adacomcat.utils.model import copied, unwrapped


def compress(model: nn.Module, *, keep_params: float | None = None,
             keep_macs: float | None = None, keep_bytes: float | None = None,
             max_latency_ms: float | None = None, plan: RankPlan | None = None,
             calibration: Tensor | Iterable | Calibration | None = None,
             refit: bool | None = None, include: Filters | None = None,
             exclude: Filters | None = None, multiple: int = MULTIPLE, deploy: str = "any",
             latency_batch: int = 1, refine: int = 0,
             refine_images: Tensor | Iterable | None = None, quantize: str | None = None,
             bits: Sequence[int] | None = None) -> nn.Module:
    """A compressed copy of ``model``, without training.

    Exactly one of the first five arguments says how small it becomes.

    Args:
        model: a dense model, on the device where it will run; it stays as it is. Of a compiled or
            wrapped model what is inside is compressed. Layers with adapters, masks, hooks,
            parametrizations or quantised weights stay dense, and a warning names them.
        keep_params: the fraction of the whole model's parameters to keep, in (0, 1].
        keep_macs: the fraction of its multiply-accumulates for one image to keep, in (0, 1].
        keep_bytes: the fraction of the bytes of its weights to keep, in (0, 1]. Ranks and bits are
            chosen together: attentions and MLPs on few bits are quantised as ``quantize`` does.
        max_latency_ms: milliseconds of one forward pass, measured on this machine with its threads
            as they are set. On a CPU with our kernels ``adacomcat.optimize`` of the result counts.
        plan: ranks of your own, by names of sites or globs over them.
        calibration: what the model takes: images (N, C, H, W) as it sees them, a mapping of its
            arguments ({"pixel_values": …}), or an iterable of such batches with or without labels;
            or what ``calibrate`` made of them, for one budget after another. With them MLPs lose
            neurons; without them weights alone decide, and MLPs get ranks.
        refit: whether the blocks of a plain ViT are fitted one after the other to the images,
            which takes most of the time and loses the least. False cuts the factors of the
            calibration, in seconds. Where not given they are fitted where there are images.
        include: the sites that may be compressed: globs over names ('blocks.*.mlp'), compiled
            regular expressions, or functions of (module name, module); with all that is inside.
        exclude: the sites that stay dense, named in the same way. Where blocks are fitted in
            sequence, their weights may change to repair what came before.
        multiple: the step of ranks per head; elsewhere ranks go in steps of twice that. It is
            halved where a fraction cannot be reached otherwise.
        deploy: 'tensorrt' or 'flash' chooses ranks per head that the fused attention of TensorRT or
            of PyTorch on GPUs takes. Our own kernels take any.
        latency_batch: images in the forward pass that ``max_latency_ms`` is about.
        refine: how many more plans at the budget are tried. The best is the one that keeps closest
            to the dense model on images which made no factors.
        refine_images: images for the refinement, ``calibration`` where not given; the first half
            makes factors, the second half judges, and should show other pictures.
        quantize: 'int8' or 'int4' quantises the result, as ``adacomcat.quantize`` does with the
            images of ``calibration``. 'int8' with ``max_latency_ms`` plans with times of int8.
        bits: what ``keep_bytes`` chooses from: 32 or 16 for floats, 8 (int8), 4 (weights alone).
            Floats as the model has them, and 8, where not given.

    Returns:
        The model; ``.rank_plan`` has its ranks and bits, ``.refinement`` what a refinement changed.

    Raises:
        UserError: arguments contradict each other or are out of range, a weight or an image is not
            finite, a filter or the plan names what the model does not have, or the budget cannot be
            reached.
    """
    settings = {name: value for name, value in locals().items() if name != "model"}
    made, names = copied(unwrapped(model)), _names_when_held(unwrapped(model))
    return _compress_alone(made, names, settings) if names else compress_(made, **settings)


def compress_(model: nn.Module, *, keep_params: float | None = None,
              keep_macs: float | None = None, keep_bytes: float | None = None,
              max_latency_ms: float | None = None, plan: RankPlan | None = None,
              calibration: Tensor | Iterable | Calibration | None = None,
              refit: bool | None = None, include: Filters | None = None,
              exclude: Filters | None = None, multiple: int = MULTIPLE, deploy: str = "any",
              latency_batch: int = 1, refine: int = 0,
              refine_images: Tensor | Iterable | None = None, quantize: str | None = None,
              bits: Sequence[int] | None = None) -> nn.Module:
    """``compress`` in place, with its arguments and errors; returns ``model``, unwrapped."""
    model = unwrapped(model)
    require_not_quantized(model, "compress")
    goal = _goal({"params": keep_params, "macs": keep_macs, "bytes": keep_bytes,
                  "latency_ms": max_latency_ms}, plan)
    if isinstance(goal, RankPlan):
        goal = goal.resolved(model)
        _bits(model, quantize, bits, "")
    else:
        kind, value = goal
        goal = Budget(kind, value, latency_batch, multiple, deploy,
                      _bits(model, quantize, bits, kind))
    _require_agreement(goal, calibration, refit, include, exclude, refine)
    require_finite_model(model)
    seen = _seen(model, calibration, refit, include, exclude)
    sites = _sites(model, goal, seen, include, exclude)
    if any(not site.module for site in sites):
        raise UserError(f"nothing holds this {type(model).__name__}, so that it cannot be replaced "
                        "in place; use compress, which returns another")
    _tell_altered(model)
    if isinstance(goal, RankPlan):
        chosen = _given(model, goal, sites, seen)
    elif refine and seen.batches is not None:
        trial_batches = _batches(refine_images, model, "refine_images") or seen.batches
        chosen = _refined(model, sites, goal, seen, trial_batches, refine)
    else:
        chosen = _allocated(model, sites, goal, seen)
    convert_(model, chosen.plan, chosen.factors, seen.batches)
    record_(model, refinement=chosen.refinement,
            errors={name: factors.errors.cpu() for name, factors in chosen.factors.items()})
    few = chosen.plan.bits if quantize is None else {"": bits_of(quantize)} | chosen.plan.bits
    if few:
        model = quantized_(model, seen.images, few)
    if isinstance(goal, Budget) and goal.kind == "bytes":
        model.to(float_dtype(model, goal.bits))
    return model


class _Holder(nn.Module):
    """Holds a layer that is compressed alone, under the name 'held'."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.held(*args, **kwargs)


def _names_when_held(layer: nn.Module) -> dict[str, str]:
    """Name of each site of ``layer`` → its name in a holder; nothing where ``layer`` is a model,
    and no site is all of it."""
    sites = [site for pruned in ((), prunable_mlps(layer)) for site in find_sites(layer, pruned)]
    if all(site.module for site in sites):
        return {}
    return {site.name: f"held.{site.name}" if site.module else f"held{site.name}"
            for site in sites}


def _compress_alone(layer: nn.Module, names: Mapping[str, str], settings: dict[str, Any]
                    ) -> nn.Module:
    """``compress_`` in a holder. The plan's names become those of the holder's sites, and back;
    images become arguments of ``layer``."""
    for name in ("calibration", "refine_images"):
        if not (settings[name] is None or isinstance(settings[name], Calibration)):
            settings[name] = calibration_batches(settings[name], layer)
    if isinstance(plan := settings["plan"], RankPlan):
        settings["plan"] = RankPlan({names.get(name, name): rank
                                     for name, rank in plan.resolved(layer).ranks.items()},
                                    {f"held.{name}": bits for name, bits in plan.bits.items()})
    holder = compress_(_Holder(layer), **settings)
    made, found = holder.get_submodule("held"), compression_of(holder).plan or RankPlan()
    record_(made, plan=RankPlan({name: found[held] for name, held in names.items()
                                 if held in found.ranks},
                                {name.removeprefix("held").lstrip("."): bits
                                 for name, bits in found.bits.items()}))
    return made


class _Seen(NamedTuple):
    """What there is beside weights: a calibration, images to fit to, or neither."""

    kept: Calibration | None
    batches: list[Inputs] | None
    images: list[Inputs] | None = None  # all that there are, also where blocks are not fitted

    @property
    def any(self) -> bool:
        return self.kept is not None or self.batches is not None


def _seen(model: nn.Module, calibration: Tensor | Iterable | Calibration | None,
          refit: bool | None, include: Filters | None, exclude: Filters | None) -> _Seen:
    if calibration is not None and not isinstance(calibration, Calibration):
        batches = calibration_batches(calibration, model)
        if refit is not False or not sequential_blocks(model):
            return _Seen(None, batches, batches)
        return _Seen(calibrate(model, batches, keep_images=False, include=include,
                               exclude=exclude), None, batches)
    if calibration is None:
        return _Seen(None, None)
    calibration.require_of(model)
    images = calibration.images_for(model)
    batches = None if refit is False else images
    if refit and batches is None:
        raise UserError("refit fits blocks to images, and this calibration kept none; calibrate "
                        "with keep_images=True (without --no-images), or leave refit out")
    return _Seen(calibration, batches, images)


def _goal(budgets: Mapping[Kind, float | None],
          plan: RankPlan | None) -> tuple[Kind, float] | RankPlan:
    """What was asked for: a plan, or a budget that is not checked yet."""
    given: list[tuple[Kind, float]] = [(kind, value) for kind, value in budgets.items()
                                       if value is not None]
    if len(given) + (plan is not None) != 1:
        raise UserError("say exactly one of keep_params, keep_macs, keep_bytes, max_latency_ms and "
                        "plan")
    if plan is None:
        return given[0]
    if not isinstance(plan, RankPlan):
        raise UserError(f"plan must be a RankPlan, as RankPlan.load gives; got {plan!r:.60}")
    return plan


def _bits(model: nn.Module, quantize: str | None, bits: Sequence[int] | None,
          kind: str) -> tuple[int, ...]:
    """``Budget.bits`` for a budget of this kind; both settings are checked."""
    few = None if quantize is None else bits_of(quantize)
    if kind == "bytes":
        if few is not None:
            raise UserError("keep_bytes chooses the bits of numbers: give bits, and leave out "
                            "quantize")
        own = 8 * next(model.parameters()).dtype.itemsize
        return (min(own, 32), 8) if bits is None else tuple(bits)
    if bits is not None:
        raise UserError("bits are what keep_bytes chooses from: give keep_bytes, or quantize")
    if kind != "latency_ms" or few is None:
        return ()
    if few != 8:
        raise UserError("max_latency_ms plans in float or in int8, and 4-bit weights run as float "
                        "ones: leave out quantize, and quantise the result")
    return (few,)


def _require_agreement(goal: Budget | RankPlan, calibration: object, refit: bool | None,
                       include: object, exclude: object, refine: int) -> None:
    planned = isinstance(goal, RankPlan)
    if refit and calibration is None:
        raise UserError("refit fits blocks to images: give calibration")
    imageless = isinstance(calibration, Calibration) and calibration.batches is None
    if refine and (imageless or refit is False):
        raise UserError("refine makes factors of images: calibrate with keep_images=True (without "
                        "--no-images), and do not switch refit off")
    if refine and (planned or calibration is None):
        raise UserError("refine tries plans at a budget and judges them by images: give both, and "
                        "no plan")
    if planned and not (include is None and exclude is None):
        raise UserError("a plan names its own sites: leave out include and exclude, or the plan")


def _batches(images: Tensor | Iterable | None, model: nn.Module, name: str) -> list[Inputs] | None:
    return None if images is None else calibration_batches(images, model, name)


def _sites(model: nn.Module, goal: Budget | RankPlan, seen: _Seen,
           include: Filters | None, exclude: Filters | None) -> list[Site]:
    """The decisions to take. Only activations tell which neurons an MLP can spare."""
    if isinstance(goal, RankPlan):
        return goal.validate(model)
    prunable = prunable_mlps(model) if seen.any else ()
    pruned = _pruned(model)
    sites = [site for site in find_sites(model, prunable, include, exclude)
             if site.kind == "hidden" or not site.name.startswith(pruned)]
    if not sites and not (include is None and exclude is None):
        raise UserError("include and exclude leave no projection to compress")
    return sites


def _tell_altered(model: nn.Module) -> None:
    names = altered_layers(model)
    if names:
        warnings.warn(f"{len(names)} layers stay dense, since an adapter, a mask, a hook, a "
                      "parametrization, a method of their own or quantised weights change what "
                      f"they compute ({', '.join(names[:3])} …); merge or remove these first to "
                      "compress them", stacklevel=3)


def _pruned(model: nn.Module) -> tuple[str, ...]:
    """How the names inside of MLPs begin that an earlier compression took neurons from.

    No plan describes an MLP that has both fewer neurons and ranks, so these keep full projections.
    """
    earlier = compression_of(model).ranks
    return tuple(name.removesuffix(HIDDEN) + "." for name, rank in earlier.items()
                 if name.endswith(HIDDEN) and rank != DENSE)


class _Chosen(NamedTuple):
    """Ranks, and the factors that the conversion cuts to them."""

    plan: RankPlan
    factors: Factors
    refinement: Refined | None = None


def _given(model: nn.Module, plan: RankPlan, sites: list[Site], seen: _Seen) -> _Chosen:
    shrinking = [site for site in sites if plan[site.name] != DENSE]
    return _Chosen(plan, _factors(model, shrinking, seen))


def _allocated(model: nn.Module, sites: list[Site], budget: Budget, seen: _Seen) -> _Chosen:
    if seen.kept is not None:
        seen.kept.require_sites(sites)
    found = seen.kept.known if seen.kept else survey(model, sites, seen.batches)
    allocator = budget.allocator(model, found.factors, sites, seen.images)
    plan = allocator.plan(found.weights(sites, refitted=seen.batches is not None))
    return _Chosen(plan, seen.kept.factors_for(model) if seen.kept else found.factors)


def _refined(model: nn.Module, sites: list[Site], budget: Budget, seen: _Seen,
             trial_batches: list[Inputs], candidates: int) -> _Chosen:
    """The refinement makes factors of its own images, the conversion of all calibration images."""
    refined = refined_on_images(model, sites, budget, trial_batches, candidates)
    return _Chosen(refined.plan, _factors(model, sites, seen), refined)


def _factors(model: nn.Module, sites: list[Site], seen: _Seen) -> Factors:
    """The factors that ``convert_`` takes at a plan that is known."""
    sites = _outside_sequence(model, sites, seen.batches)
    if seen.kept is not None:
        seen.kept.require_sites(sites)
        return seen.kept.factors_for(model)
    if not sites:
        return {}
    return factorize_model(model, model_statistics(model, seen.batches, sites), sites=sites)


def _outside_sequence(model: nn.Module, sites: list[Site],
                      batches: list[Inputs] | None) -> list[Site]:
    """The sites that ``convert_`` takes factors for: it fits blocks in sequence by itself."""
    if batches is None or not sequential_blocks(model):
        return sites
    inside = in_sequence(model)
    return [site for site in sites if not site.name.startswith(inside)]
