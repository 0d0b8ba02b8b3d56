"""What a run trains: the dense model made ready, and the search with the plan that it starts from.

``train.run`` calls ``make_ready``, then ``start_search``, and gives the student its ``drop_path``.
"""

import copy
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from adacomcat import data
from adacomcat.allocation.budget import Budget
from adacomcat.allocation.refine import Loss, refined_allocation
from adacomcat.allocation.sensitivity import ErrorWeights, error_weights
from adacomcat.convert.calibrate import calibration_batches, collect_statistics
from adacomcat.convert.factors import Factors, blank_factors, factorize_model
from adacomcat.convert.record import Refined, compression_of
from adacomcat.cost import model_params
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.evaluation import evaluate
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.search.gates import RankGates, reachable_multiple, uniform_plan
from adacomcat.search.published import drop_attention_biases_, freeze_attention_biases_, menu
from adacomcat.search.search import RankSearch
from adacomcat.search.supernet import build_supernet, explicit_plan, set_ranks_
from adacomcat.sites import DENSE, Site, find_sites, prunable_mlps
from adacomcat.utils.distributed import Processes
from adacomcat.utils.inputs import Inputs
from adacomcat.utils.random import derived_generator

CALIBRATION = 100  # the stream of random numbers that picks calibration images
MOST_JUDGES = 1024  # labelled images that judge the plans of a refinement


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


def judging_images(train_set: Any, config: TrainConfig) -> Any:
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
    batches: list[Inputs] | None  # calibration images
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
    gates, multiple = _gates(ready, config, plan, target)
    refined = None
    if plan is not None:
        start = plan
    elif config.resume:  # the state has the plan
        start = RankPlan()
    elif config.start == "largest":
        start = gates.largest()
    elif config.start == "allocation":
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


def _gates(ready: Ready, config: TrainConfig, plan: RankPlan | None,
           target: float) -> tuple[RankGates, int]:
    """The architecture parameters, and the step of their ranks."""
    if plan is not None:
        return RankGates(ready.sites, 1), 1
    if config.menu == "comcat":
        return RankGates(ready.sites, menu=menu), 1
    multiple = reachable_multiple(ready.sites, target - ready.fixed, config.rank_multiple)
    return RankGates(ready.sites, multiple), multiple


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
        freeze_attention_biases_(supernet)
    processes.broadcast_(supernet)
    return supernet


def _allocated_plan(ready: Ready, supernet: nn.Module, config: TrainConfig, processes: Processes,
                    judges: Any) -> tuple[RankPlan, Refined | None]:
    """The allocation's plan at ``config.keep_params``; with judges a refined one."""
    assert config.keep_params is not None  # an allocation has a budget
    weights = error_weights(ready.model, ready.factors, ready.batches, ready.sites)
    budget = Budget("params", config.keep_params, multiple=config.rank_multiple)
    allocator = budget.allocator(ready.model, ready.factors, ready.sites)

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


def set_drop_path_(model: nn.Module, rate: float | None) -> nn.Module:
    """Give the branches of ``model``'s blocks rates that rise from 0 to ``rate``, as timm has them.

    Blocks are the modules that hold a ``drop_path``, as timm names it; None leaves all as it is.
    """
    if rate is None:
        return model
    blocks = [module for module in model.modules()
              if any(name.startswith("drop_path") for name, _ in module.named_children())]
    rates: Any = calculate_drop_path_rates(rate, len(blocks))
    for block, own in zip(blocks, rates, strict=True):
        for name, _ in list(block.named_children()):
            if name.startswith("drop_path"):
                setattr(block, name, DropPath(own) if own else nn.Identity())
    return model
