"""Linear layers on few bits: what ``adacomcat.quantize`` puts in the place of ``nn.Linear``."""

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.ops import int4, int8

Made = TypeVar("Made", bound="QuantizedLinear")


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W = q · s: whole numbers q and scales s. x and y are float.

    The layer does not train: rounding has no gradient. Subclasses say how numbers lie in
    ``weight`` and ``weight_scale``.

    Args:
        in_features: Size of the last dimension of x (..., in).
        out_features: Size of the last dimension of y (..., out).
        bias: Whether there is a ``bias`` (out,).
    """

    bits: ClassVar[int]
    weight: Tensor
    weight_scale: Tensor  # its dtype stays, whatever the dtype of the model

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight, scale = self._empty(in_features, out_features, device)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        zeros = torch.zeros(out_features, device=device, dtype=dtype)
        self.bias = nn.Parameter(zeros, requires_grad=False) if bias else None

    @staticmethod
    def _empty(inputs: int, outputs: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """``weight`` and ``weight_scale`` of these sizes."""
        raise NotImplementedError

    @classmethod
    @cache
    def weight_bytes(cls, outputs: int, inputs: int) -> int:
        """Of ``weight`` and ``weight_scale`` of a layer of these sizes."""
        return sum(tensor.numel() * tensor.element_size()
                   for tensor in cls._empty(inputs, outputs, torch.device("meta")))

    @classmethod
    def like(cls: type[Made], linear: nn.Linear) -> Made:
        """A layer of ``linear``'s shape, device, dtype and mode; its weight is zero."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None,
                   linear.weight.device, linear.weight.dtype)
        return made.train(linear.training)

    @property
    def dense(self) -> Tensor:
        """q · s, (out, in), in float32."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + b"""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> NoReturn:
        """What ``torch.jit.script`` calls first.

        Raises:
            UserError: always.
        """
        raise UserError("torch.jit.script does not take quantised layers; torch.jit.trace, "
                        "torch.export and torch.compile do")

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError("a quantised model does not train: rounding has no gradient; "
                            "train the model that adacomcat.quantize was given")
        return self.product(x)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Scales move with the model and keep their dtype: they would lose digits."""
        scale = self.weight_scale
        result = super()._apply(fn, recurse)
        moved = self.weight_scale
        if moved.dtype != scale.dtype:
            self.weight_scale = scale.to(moved.device)
        return result

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, int{self.bits}")


class Int8Linear(QuantizedLinear):
    """``weight`` q (out, in), int8; ``weight_scale`` s (out,), float32.

    x is rounded to int8 token by token at every call (``ops.int8.linear``).
    """

    bits = 8

    @staticmethod
    def _empty(inputs: int, outputs: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
        return (torch.zeros(outputs, inputs, device=device, dtype=torch.int8),
                torch.ones(outputs, device=device, dtype=torch.float32))

    @property
    def quantized_weight(self) -> int8.Int8Weight:
        """q and s."""
        return int8.Int8Weight(self.weight, self.weight_scale)

    @property
    def dense(self) -> Tensor:
        return self.quantized_weight.dense

    def product(self, x: Tensor) -> Tensor:
        return int8.linear(x, self.quantized_weight, self.bias)


class Int4Linear(QuantizedLinear):
    """Weights alone are on 4 bits, as ``ops.int4.Int4Weight`` has them; x stays float."""

    bits = 4

    @staticmethod
    def _empty(inputs: int, outputs: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
        return (torch.zeros(outputs, -(-inputs // 2), device=device, dtype=torch.uint8),
                torch.ones(outputs, -(-inputs // int4.GROUP), device=device, dtype=torch.bfloat16))

    @property
    def quantized_weight(self) -> int4.Int4Weight:
        """q and s."""
        return int4.Int4Weight(self.weight, self.weight_scale, self.in_features)

    @property
    def dense(self) -> Tensor:
        return self.quantized_weight.dense

    def product(self, x: Tensor) -> Tensor:
        return int4.linear(x, self.quantized_weight, self.bias)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """The float layer of the same numbers."""
        made = nn.Linear(self.in_features, self.out_features, device="meta")
        made.weight = nn.Parameter(self.dense.to(dtype), requires_grad=False)
        made.register_parameter("bias", self.bias)
        return made.train(self.training)


# Bits of a weight's numbers → the layer that holds them.
QUANTIZED: Mapping[int, type[QuantizedLinear]] = {8: Int8Linear, 4: Int4Linear}
