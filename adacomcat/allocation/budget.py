"""Budget → plan, without a search: a multiple-choice knapsack over truncation errors."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from adacomcat.allocation.knapsack import Choice, knapsack
from adacomcat.allocation.sensitivity import error_weights, weighted_error
from adacomcat.convert.factors import Factors
from adacomcat.cost import model_params, module_tokens, plan_macs, site_macs
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, MULTIPLE, Rank, Site, find_sites


def choices(site: Site, factors: Factors, weights: dict[str, float], cost: "Cost",
            multiple: int) -> list[Choice]:
    return [Choice(cost(site, rank), weighted_error(factors, weights, site, rank))
            for rank in site.candidates(multiple)]


# Weights of all sites' errors → the plan of least error within a budget.
Allocate = Callable[[dict[str, float]], RankPlan]


def choose_plan(model: nn.Module, factors: Factors, *, keep_params: float | None = None,
                keep_macs: float | None = None, calibration: Tensor | Iterable | None = None,
                multiple: int = MULTIPLE, sites: list[Site] | None = None) -> RankPlan:
    """The knapsack's plan for a budget given as a fraction of the whole model.

    sites: the decisions to take; every rank where not given.

    Where the budget cannot be reached with ranks in steps of ``multiple``, the steps are halved.
    """
    sites = find_sites(model) if sites is None else sites
    allocate = allocator(model, factors, sites, keep_params=keep_params, keep_macs=keep_macs,
                         multiple=multiple)
    return allocate(error_weights(model, factors, calibration, sites))


def allocator(model: nn.Module, factors: Factors, sites: list[Site], *,
              keep_params: float | None = None, keep_macs: float | None = None,
              multiple: int = MULTIPLE) -> Allocate:
    """``choose_plan`` for any weights."""
    keep = keep_params if keep_params is not None else keep_macs
    if not 0 < keep <= 1:
        raise UserError(f"keep must be a fraction in (0, 1], like 0.5; got {keep}")
    cost, whole = _parameter_cost(model) if keep_macs is None else _mac_cost(model, sites)
    fixed = whole - sum(cost(site, DENSE) for site in sites)

    def allocate(weights: dict[str, float]) -> RankPlan:
        step = multiple
        while step:
            items = [choices(site, factors, weights, cost, step) for site in sites]
            chosen = knapsack(items, keep * whole - fixed)
            if chosen is not None:
                return RankPlan({site.name: site.candidates(step)[index]
                                 for site, index in zip(sites, chosen, strict=True)})
            step //= 2
        least = (fixed + sum(min(c.cost for c in item) for item in items)) / whole
        raise UserError(f"keep {keep:g} is below what is reachable here; the least is {least:.4f}")

    return allocate


Cost = Callable[[Site, Rank], float]


def _parameter_cost(model: nn.Module) -> tuple[Cost, float]:
    return (lambda site, rank: site.params(rank)), model_params(model)


def _mac_cost(model: nn.Module, sites: list[Site]) -> tuple[Cost, float]:
    tokens = module_tokens(model, (site.module for site in sites))
    return (lambda site, rank: site_macs(site, rank, tokens)), plan_macs(model, RankPlan())
