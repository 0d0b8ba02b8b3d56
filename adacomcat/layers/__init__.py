"""Drop-in modules: low-rank linear layers, MLPs and attentions, and their fused forms."""

from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import LowRankMlp
from adacomcat.moved import forward

__all__ = ["LowRankAttention", "LowRankLinear", "LowRankMlp"]

__getattr__ = forward(__name__, ("layers.linear", "layers.mlp"))
