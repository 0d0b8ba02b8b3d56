"""What the compressed model may cost, as one value, and what makes plans within it."""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from adacomcat.allocation.fraction import FractionAllocator, mac_cost, parameter_cost
from adacomcat.allocation.latency import LatencyAllocator
from adacomcat.allocation.sensitivity import ErrorWeights
from adacomcat.convert.factors import Factors
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import MULTIPLE, Site
from adacomcat.utils.limits import DEPLOYMENTS, FRACTION, NUMBER, POSITIVE

Kind = Literal["params", "macs", "latency_ms"]
KINDS: tuple[Kind, ...] = ("params", "macs", "latency_ms")


class Allocator(Protocol):
    """Makes plans at one budget for one model."""

    def plan(self, weights: ErrorWeights, /) -> RankPlan:
        """The plan of least error within the budget. ``weights``: what each site's error counts."""
        ...


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost.

    Args:
        kind: 'params' or 'macs' for a fraction of the whole dense model's parameters or
            multiply-accumulates; 'latency_ms' for measured milliseconds.
        value: the fraction, in (0, 1], or the milliseconds, above 0.
        batch: images in one measured forward pass; 'latency_ms' alone reads it.
        multiple: the step of ranks per head; elsewhere ranks go in steps of twice that.
        deploy: the runtime whose fused attention the ranks must allow; see ``deployment``.

    Raises:
        UserError: a field is out of its range.
    """

    kind: Kind
    value: float
    batch: int = 1
    multiple: int = MULTIPLE
    deploy: str = "any"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown budget {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.kind == "latency_ms":
            if not POSITIVE.holds(self.value):
                raise UserError(f"max_latency_ms must be above 0; got {self.value}")
        elif not FRACTION.holds(self.value):
            raise UserError(f"keep must be a fraction in (0, 1], like 0.5; got {self.value!r}")
        if self.deploy not in DEPLOYMENTS:
            raise UserError(f"unknown deployment {self.deploy!r:.40}; choose one of "
                            f"{', '.join(DEPLOYMENTS)}")
        for name, count in (("multiple", self.multiple), ("latency_batch", self.batch)):
            if not NUMBER.holds(count):
                raise UserError(f"{name} must be at least 1; got {count!r}")

    def allocator(self, model: nn.Module, factors: Factors, sites: list[Site]) -> Allocator:
        """What makes plans for ``model`` at this budget.

        For 'latency_ms' this times the model's parts and takes a while; the plans share them.
        """
        if self.kind == "latency_ms":
            return LatencyAllocator(model, factors, sites, max_latency_ms=self.value,
                                    batch=self.batch, multiple=self.multiple,
                                    deploy=self.deploy)
        cost, whole = (parameter_cost if self.kind == "params" else mac_cost)(model, sites)
        return FractionAllocator(sites, factors, cost, whole, keep=self.value,
                                 multiple=self.multiple, deploy=self.deploy)
