"""What the compressed model may cost, as one value, and what makes plans within it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from adacomcat.allocation.bits import BytesAllocator
from adacomcat.allocation.fraction import FractionAllocator, mac_cost, parameter_cost
from adacomcat.allocation.latency import LatencyAllocator
from adacomcat.allocation.sensitivity import ErrorWeights
from adacomcat.convert.factors import Factors
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import MULTIPLE, Site
from adacomcat.utils.inputs import Inputs
from adacomcat.utils.limits import (
    DEPLOYMENTS,
    FLOAT_BITS,
    FRACTION,
    NUMBER,
    POSITIVE,
    WEIGHT_BITS,
)

Kind = Literal["params", "macs", "bytes", "latency_ms"]
KINDS: tuple[Kind, ...] = ("params", "macs", "bytes", "latency_ms")


class Allocator(Protocol):
    """Makes plans at one budget for one model."""

    def plan(self, weights: ErrorWeights, /) -> RankPlan:
        """The plan of least error within the budget. ``weights``: what each site's error counts."""
        ...


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost.

    Args:
        kind: 'params', 'macs' or 'bytes' for a fraction of the whole dense model's parameters,
            multiply-accumulates or bytes; 'latency_ms' for measured milliseconds.
        value: the fraction, in (0, 1], or the milliseconds, above 0.
        batch: images in one measured forward pass; 'latency_ms' alone reads it.
        multiple: the step of ranks per head; elsewhere ranks go in steps of twice that.
        deploy: the runtime whose fused attention the ranks must allow; see ``deployment``.
        bits: of numbers. 'bytes' chooses from these for each attention and MLP, and 32 or 16 is
            what floats have. 'latency_ms' takes (8,) for a model that ``quantize`` rounds
            afterwards, and () for floats.

    Raises:
        UserError: a field is out of its range.
    """

    kind: Kind
    value: float
    batch: int = 1
    multiple: int = MULTIPLE
    deploy: str = "any"
    bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown budget {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.kind == "latency_ms":
            if not POSITIVE.holds(self.value):
                raise UserError(f"max_latency_ms must be above 0; got {self.value}")
        elif not FRACTION.holds(self.value):
            raise UserError(f"keep must be a fraction in (0, 1], like 0.5; got {self.value!r}")
        if self.kind == "bytes":
            require_bits(self.bits)
        if self.deploy not in DEPLOYMENTS:
            raise UserError(f"unknown deployment {self.deploy!r:.40}; choose one of "
                            f"{', '.join(DEPLOYMENTS)}")
        for name, count in (("multiple", self.multiple), ("latency_batch", self.batch)):
            if not NUMBER.holds(count):
                raise UserError(f"{name} must be at least 1; got {count!r}")

    def allocator(self, model: nn.Module, factors: Factors, sites: list[Site],
                  batches: Sequence[Inputs] | None = None) -> Allocator:
        """What makes plans for ``model`` at this budget.

        For 'latency_ms' this times the model's parts, for 'bytes' it measures what rounding loses;
        both take a while, and the plans share them.

        Args:
            batches: calibration images; 'bytes' alone reads them.
        """
        if self.kind == "latency_ms":
            return LatencyAllocator(model, factors, sites, max_latency_ms=self.value,
                                    batch=self.batch, multiple=self.multiple,
                                    deploy=self.deploy, int8=bool(self.bits))
        if self.kind == "bytes":
            return BytesAllocator(model, factors, sites, batches, keep=self.value, bits=self.bits,
                                  multiple=self.multiple, deploy=self.deploy)
        cost, whole = (parameter_cost if self.kind == "params" else mac_cost)(model, sites)
        return FractionAllocator(sites, factors, cost, whole, keep=self.value,
                                 multiple=self.multiple, deploy=self.deploy)


def require_bits(bits: Sequence[int]) -> None:
    """
    Raises:
        UserError: ``bits`` are no bits of numbers that a model can have.
    """
    known = (*FLOAT_BITS, *WEIGHT_BITS)
    if not bits or not set(bits) <= set(known) or set(FLOAT_BITS) <= set(bits):
        raise UserError(f"bits must be some of {', '.join(map(str, known))}, and floats have 32 or "
                        f"16; got {', '.join(map(str, bits)) or 'none'}")
