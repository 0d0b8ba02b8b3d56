"""The ops: public functions on tensors, their backends, and their registration with PyTorch."""

from adacomcat.moved import forward
from adacomcat.ops import backends, decompositions, inference
from adacomcat.ops.functions import (
    dense_mlp,
    gated_low_rank_linear,
    low_rank_attention,
    low_rank_linear,
    low_rank_mlp,
)

__all__ = ["backends", "decompositions", "dense_mlp", "gated_low_rank_linear", "inference",
           "low_rank_attention", "low_rank_linear", "low_rank_mlp"]

__getattr__ = forward(__name__, ("ops.registry",))
