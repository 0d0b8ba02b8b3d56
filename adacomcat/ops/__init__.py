"""The fused ops: public functions on tensors, and everything that registers them with PyTorch."""

from adacomcat.moved import forward
from adacomcat.ops.functions import (
    dense_mlp,
    gated_low_rank_linear,
    low_rank_attention,
    low_rank_linear,
    low_rank_mlp,
)

__all__ = ["dense_mlp", "gated_low_rank_linear", "low_rank_attention", "low_rank_linear",
           "low_rank_mlp"]

__getattr__ = forward(__name__, ("ops.registry",))
