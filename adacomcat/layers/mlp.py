"""Which hidden neurons of an MLP stay, and what its second projection becomes without the others.

Through the activation only a choice of coordinates passes, so the low-rank form of a whole MLP is
a column subset: y = act(x W1ᵀ + b1) W2ᵀ ≈ act(x W1ᵀ + b1)_K W_Kᵀ. With rows of the hidden
covariance C, the best W_K for a kept set K is the regression of W2 h on h_K. K comes by elimination
in blocks, least loss first, each time refitting the rest (Hassibi and Stork, Optimal Brain Surgeon,
1993; for the MLPs of language models: MoDeGPT, arXiv 2408.09632). Measured on DINOv2 ViT-S
(examples/dinov2): half the error, on other photographs, of two low-rank projections of equal size.
"""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from adacomcat import ops
from adacomcat.layers.linear import _ACTIVATIONS, LowRankLinear


def narrow(mlp: Mlp, width: int) -> Mlp:
    """A timm MLP like ``mlp``, uninitialised, with this many hidden neurons."""
    fc1, fc2 = mlp.fc1, mlp.fc2
    like = {"device": fc1.weight.device, "dtype": fc1.weight.dtype}
    made = Mlp(fc1.in_features, width, fc2.out_features, drop=(mlp.drop1.p, mlp.drop2.p), **like)
    made.act = mlp.act
    made.fc1 = nn.Linear(fc1.in_features, width, fc1.bias is not None, **like)
    made.fc2 = nn.Linear(width, fc2.out_features, fc2.bias is not None, **like)
    return made.train(mlp.training)


@torch.no_grad()
def narrowed(mlp: Mlp, kept: Tensor, weight: Tensor, bias: Tensor) -> Mlp:
    """``mlp`` with the ``kept`` neurons only, and this second projection."""
    made = narrow(mlp, len(kept))
    made.fc1.weight.copy_(mlp.fc1.weight[kept])
    if made.fc1.bias is not None:
        made.fc1.bias.copy_(mlp.fc1.bias[kept])
    made.fc2.weight.copy_(weight)
    if made.fc2.bias is not None:
        made.fc2.bias.copy_(bias)
    return made


def activation_name(module: nn.Module) -> str | None:
    """The name by which the fused ops know an activation; None where they do not."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module))


class LowRankMlp(nn.Module):
    """y = fc2(act(fc1(x))) with low-rank fc1 and fc2 in one op: the hidden layer stays on chip.

    State-dict keys are those of timm's ``Mlp`` with ``LowRankLinear`` inside.
    """

    def __init__(self, fc1: LowRankLinear, act: nn.Module, fc2: LowRankLinear,
                 drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, act, fc2
        self.drop1, self.drop2 = nn.Dropout(drop), nn.Dropout(drop)
        self.activation = activation_name(act)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None and not (self.training and self.drop1.p):
            y = ops.low_rank_mlp(x, self.fc1.v, self.fc1.u, self.fc1.bias,
                                 self.fc2.v, self.fc2.u, self.fc2.bias, self.activation)
        else:
            y = self.fc2(self.drop1(self.act(self.fc1(x))))
        return self.drop2(y)
