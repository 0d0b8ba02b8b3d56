"""The last step of every compression: at a given plan, factors and weights into the model."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from adacomcat.convert.calibrate import BATCH, Statistics, collect_statistics
from adacomcat.convert.factors import SHRINKAGE, Factors
from adacomcat.convert.install import install_
from adacomcat.convert.record import compression_of, merged, record_
from adacomcat.convert.sequential import compress_blocks_, in_sequence, sequential_blocks
from adacomcat.plan import RankPlan
from adacomcat.sites import Site
from adacomcat.utils.inputs import Inputs

# Images that measure the error curves of a model whose blocks are then fitted to all images.
ALLOCATION_IMAGES = 64


def model_statistics(model: nn.Module, batches: Sequence[Inputs] | None,
                     sites: list[Site] | None = None) -> Statistics:
    """Statistics of the dense model for ``sites``, or for every rank; none without images.

    Where the blocks are fitted in sequence afterwards, these statistics serve the allocation and
    the sites outside the blocks only, and a part of the images is enough.
    """
    if batches is None:
        return {}
    few = batches[:ALLOCATION_IMAGES // BATCH] if sequential_blocks(model) else batches
    return collect_statistics(model, few, len(few) / len(batches), sites)


def convert_(model: nn.Module, plan: RankPlan, factors: Factors,
             batches: Any = None) -> nn.Module:
    """In place: ``model`` compressed to ``plan``.

    With images the blocks are fitted one after the other where the model allows it; the factors
    then serve the sites outside the blocks. Elsewhere every site takes its factors, cut to its
    rank.
    """
    if batches is None or not sequential_blocks(model):
        return install_(model, plan, factors)
    earlier, inside = compression_of(model).ranks, in_sequence(model)
    compress_blocks_(model, plan, batches, SHRINKAGE)
    outside = RankPlan({name: rank for name, rank in plan.ranks.items()
                        if not name.startswith(inside)})
    install_(model, outside, factors)
    record_(model, plan=merged(earlier, plan))
    return model
