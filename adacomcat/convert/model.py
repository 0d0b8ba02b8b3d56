"""A plan and a model → the compressed model."""

from collections.abc import Iterable

from torch import Tensor, nn

from adacomcat.convert.calibrate import BATCH, Statistics, calibrate
from adacomcat.convert.factors import SHRINKAGE, Factors
from adacomcat.convert.install import install_
from adacomcat.convert.sequential import compress_blocks_, sequential_blocks
from adacomcat.plan import RankPlan

# Images that measure the error curves of a model whose blocks are then fitted to all images.
ALLOCATION_IMAGES = 64

BLOCKS = "blocks."  # how the names begin of what is fitted in sequence


def model_statistics(model: nn.Module, batches: list[Tensor] | None) -> Statistics:
    """Statistics of the dense model. Where the blocks will be fitted one after the other, they
    only serve the allocation, and a part of the images is enough."""
    if batches is None:
        return {}
    few = batches[:ALLOCATION_IMAGES // BATCH] if sequential_blocks(model) else batches
    return calibrate(model, few, share=len(few) / len(batches))


def convert_(model: nn.Module, plan: RankPlan, factors: Factors,
             calibration: Tensor | Iterable | None = None) -> nn.Module:
    """In place, at a given plan: block by block where the model allows it, else site by site."""
    if calibration is None or not sequential_blocks(model):
        return install_(model, plan, factors)
    compress_blocks_(model, plan, calibration, SHRINKAGE)
    outside = {name: rank for name, rank in plan.ranks.items() if not name.startswith(BLOCKS)}
    install_(model, RankPlan(outside), factors)
    model.rank_plan = plan
    return model
