"""What a compressed model knows of how it was made.

The record lies in plain attributes of the model (``rank_plan``, ``refinement``,
``adacomcat_config``), which copying and pickling keep and which users may read. The package reads
it by ``compression_of`` and writes it by ``record_``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from torch import nn

from adacomcat.plan import RankPlan
from adacomcat.sites import Rank


class Refined(NamedTuple):
    """The best plan of a refinement, the plan it started from, and their losses."""

    plan: RankPlan
    loss: float
    start: RankPlan
    start_loss: float
    tried: int  # plans, the start not counted

    @property
    def changed(self) -> dict[str, tuple[Rank, Rank]]:
        """Site → its rank before and after, where they differ."""
        return {name: (self.start[name], rank) for name, rank in self.plan.ranks.items()
                if rank != self.start[name]}

    def summary(self) -> dict[str, Any]:
        """In plain numbers, lists and dicts."""
        return {"tried": self.tried, "start_loss": self.start_loss, "loss": self.loss,
                "changed": {name: list(ranks) for name, ranks in self.changed.items()}}


class Source(TypedDict):
    """timm's name and keyword arguments of the dense model."""

    architecture: str
    model_args: dict[str, Any]


@dataclass(frozen=True)
class Compression:
    """All fields are None for a model that was never compressed."""

    plan: RankPlan | None = None
    refinement: Refined | None = None  # where the plan was refined on images
    source: Source | None = None  # where a checkpoint folder told it

    @property
    def ranks(self) -> dict[str, Rank]:
        """Site → rank of every site that the plan names."""
        return {} if self.plan is None else self.plan.ranks


# Field of ``Compression`` → attribute of the model.
ATTRIBUTES: Mapping[str, str] = {"plan": "rank_plan", "refinement": "refinement",
                                 "source": "adacomcat_config"}


def compression_of(model: nn.Module) -> Compression:
    """The record of ``model``."""
    return Compression(**{field: getattr(model, attribute, None)
                          for field, attribute in ATTRIBUTES.items()})


def record_(model: nn.Module, **known: object) -> None:
    """Write these fields of ``Compression`` to the record of ``model``; the others stay."""
    for field, value in known.items():
        setattr(model, ATTRIBUTES[field], value)
