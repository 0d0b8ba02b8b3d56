"""Plans for factors that a test has made already."""

from torch import Tensor, nn

from adacomcat import RankPlan
from adacomcat.allocation.budget import Budget, Kind
from adacomcat.allocation.latency import LatencyAllocator
from adacomcat.allocation.sensitivity import error_weights
from adacomcat.convert.factors import Factors
from adacomcat.latency.timing import Measure
from adacomcat.sites import MULTIPLE, Site, find_sites


def choose_plan(model: nn.Module, factors: Factors, kind: Kind, keep: float, *,
                batches: list[Tensor] | None = None, multiple: int = MULTIPLE) -> RankPlan:
    """The plan of least error that keeps this fraction."""
    sites = find_sites(model)
    allocator = Budget(kind, keep, multiple=multiple).allocator(model, factors, sites)
    return allocator.plan(error_weights(model, factors, batches, sites))


def choose_plan_for_latency(model: nn.Module, factors: Factors, sites: list[Site],
                            max_latency_ms: float, measure: Measure,
                            multiple: int = MULTIPLE) -> RankPlan:
    """The plan of least error by a clock of the test's own."""
    allocator = LatencyAllocator(model, factors, sites, max_latency_ms=max_latency_ms,
                                 multiple=multiple, measure=measure)
    return allocator.plan(error_weights(model, factors, None, sites))
