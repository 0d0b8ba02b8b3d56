"""One training run: a dense model in, a compressed and distilled model out.

``run`` makes the dense model ready (calibrates and factorises it), starts a search from an
allocated plan, trains and distils the supernet, and cuts it to the plan that was found. Without
epochs it compresses at the plan where training would have started.
"""

import copy
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adacomcat import data
from adacomcat.allocation.budget import Budget
from adacomcat.allocation.refine import Loss, refined_allocation
from adacomcat.allocation.sensitivity import ErrorWeights, error_weights
from adacomcat.convert.calibrate import calibration_batches, collect_statistics
from adacomcat.convert.factors import (
    Factors,
    blank_factors,
    factorize_model,
    require_finite_model,
)
from adacomcat.convert.model import convert_
from adacomcat.convert.record import Refined, compression_of
from adacomcat.cost import model_params
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.evaluation import evaluate
from adacomcat.distill.metrics import Observer
from adacomcat.distill.state import has_state, load_state
from adacomcat.distill.trainer import Trainer
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.search.gates import RankGates, reachable_multiple, uniform_plan
from adacomcat.search.search import RankSearch
from adacomcat.search.supernet import build_supernet, explicit_plan, finalize, set_ranks_
from adacomcat.sites import DENSE, Site, find_sites, prunable_mlps
from adacomcat.utils.checksum import checksum
from adacomcat.utils.distributed import Processes, start_processes
from adacomcat.utils.random import derived_generator

CALIBRATION = 100  # the stream of random numbers that picks calibration images
MOST_JUDGES = 1024  # labelled images that judge the plans of a refinement


class TrainResult(NamedTuple):
    """The trained model, and what happened: plain numbers, lists and dicts."""

    model: nn.Module
    results: dict[str, Any]


def run(model: nn.Module, config: TrainConfig, train_set: Any, test_set: Any = None, *,
        teacher: nn.Module | None = None, plan: RankPlan | None = None,
        observer: Observer | None = None) -> TrainResult:
    """Compress and train a copy of ``model``; without keep_params and plan, train it as it is.

    Args:
        model: a dense model; one that is compressed already is only trained as it is.
        config: everything else that decides the run.
        train_set: labelled images, from ``data.train_and_test``. A part of them calibrates, and a
            part is held out for the search.
        test_set: labelled images that judge the result, and every epoch.
        teacher: what is distilled; the dense model where not given.
        plan: the ranks, in place of an allocation and a search.
        observer: gets the events of ``distill.metrics`` on the first process.

    Returns:
        The trained model in eval mode, and the results: parameters, history, searches, seconds,
        and with ``test_set`` the loss and top-1 accuracy in percent.

    Raises:
        UserError: settings contradict each other, the budget cannot be reached, the model has no
            site or is compressed already, a weight is not finite, the loss diverges, or the state
            to resume from belongs to another run or cannot be written.
        Lost: another process of the run died or stands still.
        Stopped: a signal asked the run to stop, inside ``utils.stopping.heeding_signals``; with
            a state_dir it can be resumed.
    """
    config = config.checked()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if plan is not None and config.refine:
        raise UserError("a plan fixes the ranks and leaves nothing to refine: give one of them")
    require_finite_model(model)
    plan = None if plan is None else plan.resolved(model)
    processes = start_processes(config.device, config.timeout)
    config = _resuming_or_not(config, processes)
    model = copy.deepcopy(model).to(processes.device)
    start = time.perf_counter()
    began_with = _checksums(model, config, train_set, teacher, plan)
    if config.keep_params is None and plan is None:
        trainer = _dense_trainer(model, config, train_set, processes, teacher, began_with)
    elif config.total_epochs == 0:
        return _without_epochs(model, config, train_set, test_set, plan, processes)
    else:
        trainer = _search_trainer(model, config, train_set, processes, teacher, plan, began_with)
    trainer.observer = observer
    if config.resume:
        trainer.load_state_dict(load_state(str(config.state_dir)))
    elif trainer.search is not None:
        trainer.save()  # calibrating and factorising may have taken long
    trainer.train(test_set)
    trained = trainer.best_model
    if trainer.search is not None:
        trained = finalize(trained, trainer.search.plan)
    seconds = time.perf_counter() - start
    return TrainResult(trained.eval(), _results(model, trained, trainer, test_set, seconds))


def _dense_trainer(model: nn.Module, config: TrainConfig, train_set: Any, processes: Processes,
                   teacher: nn.Module | None, began_with: dict[str, str]) -> Trainer:
    student = copy.deepcopy(model)
    student.requires_grad_(True)
    processes.broadcast_(student)
    return Trainer(student, config, train_set, processes, teacher=_frozen(teacher, processes),
                   inputs=began_with)


def _checksums(model: nn.Module, config: TrainConfig, train_set: data.LabelledImages,
               teacher: nn.Module | None, plan: RankPlan | None) -> dict[str, str]:
    """What decides the run beside its settings, by checksums; nothing where no state is kept."""
    if config.state_dir is None:
        return {}
    found = {"model": checksum(model.state_dict()), "training set": train_set.checksum(),
             "plan": checksum(None if plan is None else plan.ranks)}
    if config.has_teacher and teacher is not None:
        found["teacher"] = checksum(teacher.state_dict())
    return found


def _search_trainer(model: nn.Module, config: TrainConfig, train_set: Any, processes: Processes,
                    teacher: nn.Module | None, plan: RankPlan | None,
                    began_with: dict[str, str]) -> Trainer:
    if config.has_teacher:
        teacher = _frozen(model if teacher is None else teacher, processes)
    searching = config.search != "off" and plan is None
    train_part, search_part = train_set, None
    if searching:
        train_part, search_part = data.split_holdout(train_set, config.search_fraction, config.seed)
    judges = _judges(train_set, config)
    ready = make_ready(model, config, train_set, plan, processes)
    search = start_search(ready, config, plan, processes, judges)
    return Trainer(search.supernet, config, train_part, processes,
                   teacher=teacher if config.has_teacher else None, search=search,
                   search_part=search_part, inputs=began_with)


def _frozen(teacher: nn.Module | None, processes: Processes) -> nn.Module | None:
    if teacher is None:
        return None
    teacher = copy.deepcopy(teacher).to(processes.device)
    return teacher.requires_grad_(False).eval()


def _without_epochs(model: nn.Module, config: TrainConfig, train_set: Any, test_set: Any,
                    plan: RankPlan | None, processes: Processes) -> TrainResult:
    """Compression at the plan that training would start from, with the factors that gave it.

    Without images the supernet is cut, whose factors have the model's dtype: this differs by
    rounding from factors that are cut in float64.
    """
    start = time.perf_counter()
    judges = _judges(train_set, config)
    ready = make_ready(model, config, train_set, plan, processes)
    search = start_search(ready, config, plan, processes, judges)
    if ready.batches is None:
        trained = finalize(search.supernet, search.plan)
    else:
        trained = convert_(copy.deepcopy(ready.model), search.plan, ready.factors, ready.batches)
    results = _summary(model, trained, test_set, config, processes)
    results |= _refinement(search)
    results["seconds"] = time.perf_counter() - start
    return TrainResult(trained.eval(), results)


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
    if not config.refine or config.resume:  # the state knows its plan
        return None
    order = _calibration_order(train_set, config.seed)
    chosen = order[config.calibration_images:][:MOST_JUDGES]
    if not len(chosen):
        raise UserError(f"all {len(train_set)} training images calibrate, and refine needs others "
                        "to judge plans: lower calibration_images")
    return train_set.subset(chosen)


class Ready(NamedTuple):
    """A dense model with what every plan for it is made of."""

    model: nn.Module  # its weights are decomposed
    batches: list[Tensor] | None  # calibration images
    sites: list[Site]
    factors: Factors

    @property
    def params(self) -> int:
        return model_params(self.model)

    @property
    def fixed(self) -> int:
        """Parameters that belong to no site."""
        return self.params - sum(site.dense_params for site in self.sites)


def make_ready(model: nn.Module, config: TrainConfig, train_set: Any, plan: RankPlan | None,
               processes: Processes) -> Ready:
    """Calibrate ``model`` with training images and factorise its sites; a state has both."""
    if config.drop_attention_biases:
        model = copy.deepcopy(model)
        drop_attention_biases_(model, find_sites(model))
    _require_uncompressed(model)
    sites = chosen_sites(model, config, plan)
    if not sites:
        raise UserError("this model has no projection that can be made low-rank")
    if config.resume:
        return Ready(model, None, sites, blank_factors(model, sites))
    images = calibration_images(train_set, config.calibration_images, config.seed, processes)
    batches = None if images is None else calibration_batches(images, model)
    statistics = None if batches is None else collect_statistics(model, batches)
    return Ready(model, batches, sites, factorize_model(model, statistics, sites=sites))


def _require_uncompressed(model: nn.Module) -> None:
    if any(rank != DENSE for rank in compression_of(model).ranks.values()):
        raise UserError("this model is compressed already; start from the dense model, or train "
                        "this one as it is, without a budget or a plan (--dense)")


def chosen_sites(model: nn.Module, config: TrainConfig, plan: RankPlan | None) -> list[Site]:
    """The decisions of a given plan, else those that ``config.mlp`` names.

    Only activations tell which neurons an MLP can spare: without images it gets two ranks.
    """
    if plan is not None:
        return plan.validate(model)
    neurons = config.mlp == "neurons" and config.calibration_images
    return find_sites(model, prunable_mlps(model) if neurons else ())


@torch.no_grad()
def drop_attention_biases_(model: nn.Module, sites: list[Site]) -> None:
    """Zero the biases of q, k, v and proj, as ComCAT's published code leaves them out."""
    for name in {site.module for site in sites if site.kind != "linear"}:
        attention = model.get_submodule(name)
        for key, parameter in attention.named_parameters():
            if key.endswith(("qkv.bias", "proj.bias", "q_bias", "k_bias", "v_bias")):
                parameter.zero_()


def _freeze_attention_biases_(supernet: nn.Module) -> None:
    """The biases that were dropped stay zero in training."""
    for name, parameter in supernet.named_parameters():
        if name.endswith(("full.bq", "full.bo", "full.q.bias", "full.k.bias")):
            parameter.requires_grad_(False)


def start_search(ready: Ready, config: TrainConfig, plan: RankPlan | None, processes: Processes,
                 judges: Any = None) -> RankSearch:
    """A supernet, its architecture parameters, and the plan that training starts from.

    Args:
        ready: the dense model with its sites and factors.
        config: the budget, and how ranks are searched.
        plan: ranks that are given; nothing is searched then.
        processes: who shares the run.
        judges: labelled images; with them the allocation's plan is refined.

    Raises:
        UserError: the projections cannot have as few parameters as the budget leaves them.
    """
    target = _target(ready, config, plan)
    supernet = _trainable_supernet(ready, config, processes)
    multiple = 1 if plan is not None else reachable_multiple(ready.sites, target - ready.fixed)
    gates = RankGates(ready.sites, multiple)
    refined = None
    if plan is not None:
        start = plan
    elif config.resume:  # the state has the plan
        start = RankPlan()
    elif config.start_from_allocation:
        start, refined = _allocated_plan(ready, supernet, config, processes, judges)
        gates.start_at_(explicit_plan(start, ready.sites))
    else:
        start = uniform_plan(ready.sites, target - ready.fixed, multiple)
    start = processes.broadcast_object(explicit_plan(start, ready.sites))
    policy = "off" if plan is not None else config.search
    search = RankSearch(supernet, ready.sites, gates.to(processes.device), start,
                        config.with_(search=policy).search_config(), target=target,
                        fixed=ready.fixed)
    search.refinement = None if refined is None else refined.summary()
    return search


def _target(ready: Ready, config: TrainConfig, plan: RankPlan | None) -> float:
    """Parameters of the whole compressed model."""
    if plan is not None:
        return ready.fixed + plan.params(ready.sites)
    assert config.keep_params is not None  # without both the model is trained as it is
    return config.keep_params * ready.params


def _trainable_supernet(ready: Ready, config: TrainConfig, processes: Processes) -> nn.Module:
    """The same on every process."""
    supernet = build_supernet(ready.model, ready.factors, ready.sites)
    supernet.requires_grad_(True)
    if config.drop_attention_biases:
        _freeze_attention_biases_(supernet)
    processes.broadcast_(supernet)
    return supernet


def _allocated_plan(ready: Ready, supernet: nn.Module, config: TrainConfig, processes: Processes,
                    judges: Any) -> tuple[RankPlan, Refined | None]:
    """The allocation's plan at ``config.keep_params``; with judges a refined one."""
    assert config.keep_params is not None  # an allocation has a budget
    weights = error_weights(ready.model, ready.factors, ready.batches, ready.sites)
    allocator = Budget("params", config.keep_params).allocator(ready.model, ready.factors,
                                                               ready.sites)

    def plan_for(weights: ErrorWeights) -> RankPlan:
        return processes.broadcast_object(allocator.plan(weights))

    if judges is None:
        return plan_for(weights), None
    loss_of = _cross_entropy(supernet, ready.sites, judges, config, processes)
    refined = refined_allocation(plan_for, weights, ready.sites, loss_of, config.refine)
    return refined.plan, refined


def _cross_entropy(supernet: nn.Module, sites: list[Site], judges: Any, config: TrainConfig,
                   processes: Processes) -> Loss:
    """plan → loss of the supernet cut to it."""
    def loss_of(plan: RankPlan) -> float:
        set_ranks_(supernet, explicit_plan(plan, sites))
        return evaluate(supernet, judges, 4 * config.batch_size, processes, config.workers)["loss"]
    return loss_of


def _resuming_or_not(config: TrainConfig, processes: Processes) -> TrainConfig:
    """``config.resume`` says whether there is a state to go on from: a plan and all weights."""
    if config.resume and config.state_dir is None:
        raise UserError("resume needs the folder of a training state")
    found = bool(config.resume and config.total_epochs and has_state(str(config.state_dir)))
    if not processes.agree(found):
        raise UserError(f"some processes find a training state in {config.state_dir} and others do "
                        "not: name a --state-dir that all machines share")
    return config.with_(resume=found)


def _summary(dense: nn.Module, trained: nn.Module, test_set: Any, config: TrainConfig,
             processes: Processes) -> dict[str, Any]:
    results: dict[str, Any] = {"params": model_params(trained), "dense_params": model_params(dense),
                               "history": [], "searches": [], "search_seconds": 0.0}
    results["keep"] = results["params"] / results["dense_params"]
    plan = compression_of(trained).plan
    if plan is not None:
        results["plan"] = dict(plan.ranks)
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
