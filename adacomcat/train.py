"""Dense model in, compressed and distilled model out: calibrate, allocate, search, train."""

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adacomcat import data
from adacomcat.allocation.budget import allocator
from adacomcat.allocation.refine import refined_allocation
from adacomcat.allocation.sensitivity import error_weights
from adacomcat.convert.calibrate import calibrate
from adacomcat.convert.factors import Factors, factorize_model, require_finite_model
from adacomcat.convert.model import convert_
from adacomcat.cost import model_params
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.evaluation import evaluate
from adacomcat.distill.state import has_state, load_state
from adacomcat.distill.trainer import Trainer
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.search.gates import RankGates, reachable_multiple, uniform_plan
from adacomcat.search.search import RankSearch
from adacomcat.search.supernet import build_supernet, explicit_plan, finalize, set_ranks_
from adacomcat.sites import DENSE, Site, find_sites, prunable_mlps
from adacomcat.utils.distributed import Processes, start_processes
from adacomcat.utils.random import derived_generator

CALIBRATION = 100  # the stream of random numbers that picks calibration images
JUDGES = 1024  # images that judge the plans of a refinement


class TrainResult(NamedTuple):
    """The trained model, and what happened: plain numbers, lists and dicts."""

    model: nn.Module
    results: dict[str, Any]


def run(model: nn.Module, config: TrainConfig, train_set: Any, test_set: Any = None, *,
        teacher: nn.Module | None = None, plan: RankPlan | None = None) -> TrainResult:
    """Compress and train a copy of ``model``; without keep_params and plan, train it as it is.

    The dense model is its own teacher unless another is given. ``plan`` fixes the ranks and so
    turns the search off.
    """
    config = config.checked()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if plan is not None and config.refine:
        raise UserError("a plan fixes the ranks and leaves nothing to refine: give one of them")
    require_finite_model(model)
    processes = start_processes(config.device)
    model = copy.deepcopy(model).to(processes.device)
    start = time.perf_counter()
    if config.keep_params is None and plan is None:
        trainer = _dense_trainer(model, config, train_set, processes, teacher)
    elif config.total_epochs == 0:
        return _training_free(model, config, train_set, test_set, plan, processes)
    else:
        trainer = _search_trainer(model, config, train_set, processes, teacher, plan)
    _resume(trainer, config)
    trainer.train(test_set)
    trained = trainer.best_model
    if trainer.search is not None:
        trained = finalize(trained, trainer.search.plan)
    seconds = time.perf_counter() - start
    return TrainResult(trained.eval(), _results(model, trained, trainer, test_set, seconds))


def _dense_trainer(model: nn.Module, config: TrainConfig, train_set: Any, processes: Processes,
                   teacher: nn.Module | None) -> Trainer:
    student = copy.deepcopy(model)
    student.requires_grad_(True)
    processes.broadcast_(student)
    return Trainer(student, config, train_set, processes, teacher=_frozen(teacher, processes))


def _search_trainer(model: nn.Module, config: TrainConfig, train_set: Any, processes: Processes,
                    teacher: nn.Module | None, plan: RankPlan | None) -> Trainer:
    if config.has_teacher:
        teacher = _frozen(model if teacher is None else teacher, processes)
    searching = config.search != "off" and plan is None
    train_part, search_part = train_set, None
    if searching:
        train_part, search_part = data.split_holdout(train_set, config.search_fraction, config.seed)
    source, images = prepared(model, config, train_set, processes)
    search = start_search(source, images, config, plan, processes, _judges(train_set, config))
    return Trainer(search.supernet, config, train_part, processes,
                   teacher=teacher if config.has_teacher else None, search=search,
                   search_part=search_part)


def _frozen(teacher: nn.Module | None, processes: Processes) -> nn.Module | None:
    if teacher is None:
        return None
    teacher = copy.deepcopy(teacher).to(processes.device)
    return teacher.requires_grad_(False).eval()


def prepared(model: nn.Module, config: TrainConfig, train_set: Any,
             processes: Processes) -> tuple[nn.Module, Tensor | None]:
    """The model whose weights are decomposed, and the calibration images, if any."""
    if config.drop_attention_biases:
        model = copy.deepcopy(model)
        drop_attention_biases_(model, find_sites(model))
    return model, calibration_images(train_set, config.calibration_images, config.seed, processes)


def calibration_images(train_set: Any, count: int, seed: int,
                       processes: Processes) -> Tensor | None:
    """``count`` training images without augmentation, the same on every process."""
    if not count:
        return None
    chosen = train_set.subset(_calibration_order(train_set, seed)[:count])
    batches = data.Batches(chosen, count, shuffle=False, seed=seed, epoch=0)
    return torch.cat([images for images, _ in batches]).to(processes.device)


def _calibration_order(train_set: Any, seed: int) -> Tensor:
    return torch.randperm(len(train_set), generator=derived_generator(seed, CALIBRATION))


def _judges(train_set: Any, config: TrainConfig) -> Any:
    """Training images that did not calibrate, to judge plans by; None where none is refined."""
    resumed = config.resume and config.state_dir is not None and has_state(config.state_dir)
    if not config.refine or resumed:  # the state knows its plan
        return None
    order = _calibration_order(train_set, config.seed)
    chosen = order[config.calibration_images:][:JUDGES]
    if not len(chosen):
        raise UserError(f"all {len(train_set)} training images calibrate, and refine needs others "
                        "to judge plans: lower calibration_images")
    return train_set.subset(chosen)


@torch.no_grad()
def drop_attention_biases_(model: nn.Module, sites: list[Site]) -> None:
    """Zero the biases of q, k, v and proj, as ComCAT's published code leaves them out."""
    for name in {site.module for site in sites if site.kind != "linear"}:
        attention = model.get_submodule(name)
        for key, parameter in attention.named_parameters():
            if key.endswith(("qkv.bias", "proj.bias", "q_bias", "k_bias", "v_bias")):
                parameter.zero_()


def start_search(model: nn.Module, images: Tensor | None, config: TrainConfig,
                 plan: RankPlan | None, processes: Processes, judges: Any = None) -> RankSearch:
    """Supernet, architecture parameters and the plan that training starts from.

    judges: labelled images; with them the plan of the allocation is refined
    """
    _require_uncompressed(model)
    sites = chosen_sites(model, images, config, plan)
    if not sites:
        raise UserError("this model has no projection that can be made low-rank")
    whole = model_params(model)
    fixed = whole - sum(site.dense_params for site in sites)
    target = fixed + plan.params(sites) if plan is not None else config.keep_params * whole
    factors = _factors(model, images, sites)
    supernet = build_supernet(model, factors, sites)
    supernet.requires_grad_(True)
    if config.drop_attention_biases:
        _freeze_attention_biases(supernet)
    processes.broadcast_(supernet)
    searching = plan is None and config.search != "off"
    multiple = reachable_multiple(sites, target - fixed) if plan is None else 1
    gates = RankGates(sites, multiple)
    refinement = None
    if plan is None and config.start_from_allocation:
        loss = None
        if judges is not None:
            loss = _cross_entropy(supernet, sites, judges, config, processes)
        plan, refinement = _allocation(model, factors, images, sites, config, processes, loss)
        gates.start_at_(explicit_plan(plan, sites))
    elif plan is None:
        plan = uniform_plan(sites, target - fixed, multiple)
    plan = processes.broadcast_object(explicit_plan(plan, sites))
    policy = config.search if searching else "off"
    search = RankSearch(supernet, sites, gates.to(processes.device), plan,
                        config.with_(search=policy).search_config(), target=target, fixed=fixed)
    search.refinement = refinement
    return search


def _allocation(model: nn.Module, factors: Factors, images: Tensor | None, sites: list[Site],
                config: TrainConfig, processes: Processes,
                loss: Callable[[RankPlan], float] | None) -> tuple[RankPlan, dict | None]:
    """The knapsack's plan; with a loss a refined one, and what that changed."""
    weights = error_weights(model, factors, images, sites)
    least_error = allocator(model, factors, sites, keep_params=config.keep_params)

    def allocate(weights: dict[str, float]) -> RankPlan:
        return processes.broadcast_object(least_error(weights))

    if loss is None:
        return allocate(weights), None
    refined = refined_allocation(allocate, weights, sites, loss, config.refine)
    return refined.plan, refined.summary()


def _cross_entropy(supernet: nn.Module, sites: list[Site], judges: Any, config: TrainConfig,
                   processes: Processes) -> Callable[[RankPlan], float]:
    """plan → loss of the supernet cut to it."""
    def loss(plan: RankPlan) -> float:
        set_ranks_(supernet, explicit_plan(plan, sites))
        return evaluate(supernet, judges, 4 * config.batch_size, processes, config.workers)["loss"]
    return loss


def _require_uncompressed(model: nn.Module) -> None:
    if any(rank != DENSE for rank in getattr(model, "rank_plan", RankPlan()).ranks.values()):
        raise UserError("this model is compressed already; start from the dense model, or train "
                        "this one as it is, without a budget or a plan (--dense)")


def chosen_sites(model: nn.Module, images: Tensor | None, config: TrainConfig,
                 plan: RankPlan | None) -> list[Site]:
    """A given plan's decisions; else widths or ranks of the MLPs. Which neurons may go, only
    activations tell: without images, ranks."""
    if plan is not None:
        return plan.validate(model)
    neurons = config.mlp == "neurons" and images is not None
    return find_sites(model, prunable_mlps(model) if neurons else ())


def _factors(model: nn.Module, images: Tensor | None, sites: list[Site]) -> Factors:
    statistics = None if images is None else calibrate(model, images)
    return factorize_model(model, statistics, sites=sites)


def _freeze_attention_biases(supernet: nn.Module) -> None:
    for name, parameter in supernet.named_parameters():
        if name.endswith(("full.bq", "full.bo", "full.q.bias", "full.k.bias")):
            parameter.requires_grad_(False)


def _training_free(model: nn.Module, config: TrainConfig, train_set: Any, test_set: Any,
                   plan: RankPlan | None, processes: Processes) -> TrainResult:
    """No epochs: decompose at the plan that training would start from."""
    start = time.perf_counter()
    source, images = prepared(model, config, train_set, processes)
    search = start_search(source, images, config, plan, processes, _judges(train_set, config))
    if images is None:
        trained = finalize(search.supernet, search.plan)
    else:
        trained = _sequential(source, search.plan, images)
    results = _summary(model, trained, test_set, config, processes)
    results |= _refinement(search)
    results["seconds"] = time.perf_counter() - start
    return TrainResult(trained.eval(), results)


def _sequential(model: nn.Module, plan: RankPlan, images: Tensor) -> nn.Module:
    factors = _factors(model, images, plan.sites(model))
    return convert_(copy.deepcopy(model), plan, factors, images)


def _resume(trainer: Trainer, config: TrainConfig) -> None:
    if not config.resume:
        return
    if config.state_dir is None:
        raise UserError("resume needs the folder of a training state")
    if has_state(config.state_dir):
        trainer.load_state_dict(load_state(config.state_dir))


def _summary(dense: nn.Module, trained: nn.Module, test_set: Any, config: TrainConfig,
             processes: Processes) -> dict[str, Any]:
    results: dict[str, Any] = {"params": model_params(trained), "dense_params": model_params(dense),
                               "history": [], "searches": [], "search_seconds": 0.0}
    results["keep"] = results["params"] / results["dense_params"]
    if getattr(trained, "rank_plan", None) is not None:
        results["plan"] = dict(trained.rank_plan.ranks)
    if test_set is not None:
        size = 4 * config.batch_size
        results |= evaluate(trained, test_set, size, processes, config.workers)
        if results["keep"] != 1:
            results["dense_top1"] = evaluate(dense, test_set, size, processes,
                                             config.workers)["top1"]
    return results


def _results(dense: nn.Module, trained: nn.Module, trainer: Trainer, test_set: Any,
             seconds: float) -> dict[str, Any]:
    results = _summary(dense, trained, test_set, trainer.config, trainer.processes)
    results |= {"history": trainer.history, "searches": trainer.searches, "seconds": seconds}
    if trainer.search is not None:
        results |= {"search_count": trainer.search.count,
                    "search_seconds": trainer.search.seconds} | _refinement(trainer.search)
    return results


def _refinement(search: RankSearch) -> dict[str, Any]:
    return {} if search.refinement is None else {"refinement": search.refinement}
