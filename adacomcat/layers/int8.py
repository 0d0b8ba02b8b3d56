"""A linear layer on int8: what ``adacomcat.quantize`` puts in the place of ``nn.Linear``."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.ops import int8


class Int8Linear(nn.Module):
    """y = x Wᵀ + b with W = q · s: int8 numbers q and a float32 scale s for each output channel.

    x is float and is rounded to int8 token by token at every call (``ops.int8.linear``); y is
    float. The layer does not train: rounding has no gradient.

    Args:
        in_features: Size of the last dimension of x (..., in).
        out_features: Size of the last dimension of y (..., out).
        bias: Whether there is a ``bias`` (out,).
    """

    weight: Tensor  # q, (out, in), int8
    weight_scale: Tensor  # s, (out,), float32 whatever the dtype of the model

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, device=device,
                                                   dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features, device=device,
                                                        dtype=torch.float32))
        zeros = torch.zeros(out_features, device=device, dtype=dtype)
        self.bias = nn.Parameter(zeros, requires_grad=False) if bias else None

    @classmethod
    def like(cls, linear: nn.Linear) -> "Int8Linear":
        """A layer of ``linear``'s shape, device, dtype and mode; its weight is zero."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None,
                   linear.weight.device, linear.weight.dtype)
        return made.train(linear.training)

    @property
    def quantized_weight(self) -> int8.Int8Weight:
        """q and s."""
        return int8.Int8Weight(self.weight, self.weight_scale)

    def __prepare_scriptable__(self) -> NoReturn:
        """What ``torch.jit.script`` calls first.

        Raises:
            UserError: always.
        """
        raise UserError("torch.jit.script does not take int8 layers; torch.jit.trace, "
                        "torch.export and torch.compile do")

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError("a quantised model does not train: rounding to int8 has no gradient; "
                            "train the model that adacomcat.quantize was given")
        return int8.linear(x, self.quantized_weight, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Scales move with the model and stay float32: in bfloat16 they would lose digits."""
        scale = self.weight_scale
        result = super()._apply(fn, recurse)
        moved = self.weight_scale
        if moved.dtype != scale.dtype:
            self.weight_scale = scale.to(moved.device)
        return result

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, int8")
