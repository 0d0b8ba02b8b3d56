"""What a compressed model knows of how it was made.

The record lies in plain attributes of the model (``rank_plan``, ``refinement``,
``adacomcat_config``, ``rank_errors``), which copying and pickling keep and which users may read.
The package reads it by ``compression_of`` and writes it by ``record_``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from torch import Tensor, nn

from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.quantized import QuantizedLinear
from adacomcat.layers.registry import mlp_parts, tell_holders
from adacomcat.layers.stock import LinearPair, PlainAttention
from adacomcat.plan import HIDDEN, RankPlan
from adacomcat.sites import DENSE, Rank


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
    # Site → squared error of every rank, (R + 1,), where the allocation measured it.
    errors: Mapping[str, Tensor] | None = None

    @property
    def ranks(self) -> dict[str, Rank]:
        """Site → rank of every site that the plan names."""
        return {} if self.plan is None else self.plan.ranks


# Field of ``Compression`` → attribute of the model.
ATTRIBUTES: Mapping[str, str] = {"plan": "rank_plan", "refinement": "refinement",
                                 "source": "adacomcat_config", "errors": "rank_errors"}


def compression_of(model: nn.Module) -> Compression:
    """The record of ``model``."""
    return Compression(**{field: getattr(model, attribute, None)
                          for field, attribute in ATTRIBUTES.items()})


def ranks_as_they_are(model: nn.Module) -> dict[str, Rank]:
    """Site → rank of every low-rank module that ``model`` holds now, whatever its record says.

    A head may have been replaced since, and models are compressed in two steps. The record tells
    only what the modules do not show: which MLPs lost neurons, and which half of an attention was
    folded at its full rank because the other half was not dense.
    """
    recorded = compression_of(model).ranks
    found: dict[str, Rank] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear | LinearPair):
            found[name] = module.rank
        elif isinstance(module, LowRankAttention | PlainAttention):
            halves: dict[str, Rank] = {f"{name}.vo": module.rank_vo}
            if drop_in_class(module).folds_scores:
                halves[f"{name}.qk"] = module.rank_qk
            planned = [part for part in ("qk", "q", "k", "vo")
                       if recorded.get(f"{name}.{part}", DENSE) != DENSE]
            found.update((half, rank) for half, rank in halves.items()
                         if not planned or half.rpartition(".")[2] in planned)
    pruned = {name.removesuffix(HIDDEN) for name, rank in recorded.items()
              if name.endswith(HIDDEN) and rank != DENSE}
    for name, module in model.named_modules():
        if name in pruned and (parts := mlp_parts(module)) is not None and (
                parts.dense or isinstance(parts.fc1, QuantizedLinear)):
            found[name + HIDDEN] = parts.linears[0].out_features
    return found


def drop_in_class(attn: LowRankAttention | PlainAttention) -> type[LowRankAttention]:
    """The class of a low-rank attention, whichever form it has."""
    return attn.made_from if isinstance(attn, PlainAttention) else type(attn)


def merged(earlier: Mapping[str, Rank], plan: RankPlan) -> RankPlan:
    """The plan of a model that was compressed to ``earlier`` ranks and then by ``plan``.

    An MLP has either '.hidden' or '.fc1' and '.fc2': what stayed dense before makes room.
    """
    mlps = {name.rpartition(".")[0] for name, rank in plan.ranks.items() if rank != DENSE}
    ranks: dict[str, Rank] = {name: rank for name, rank in earlier.items()
                              if rank != DENSE or name.rpartition(".")[0] not in mlps}
    ranks.update(plan.ranks)
    return RankPlan(ranks, plan.bits)


def record_(model: nn.Module, **known: object) -> None:
    """Write these fields of ``Compression`` to the record of ``model``; the others stay."""
    for field, value in known.items():
        setattr(model, ATTRIBUTES[field], value)
    if isinstance(plan := known.get("plan"), RankPlan):
        tell_holders(model, plan.ranks)
