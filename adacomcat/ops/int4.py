"""4-bit weights, for storage: W = q · s, with a scale for every group of an output's inputs.

Whole numbers q lie between -7 and 7, two of them in a byte. Products are those of the float weight
that they stand for, so that memory is saved, and no time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 7
GROUP = 32  # inputs that share a scale
_ZERO = 8  # what stands for q = 0 in half a byte


class Int4Weight(NamedTuple):
    """W (out, in) = q · s."""

    packed: Tensor  # (out, ⌈in / 2⌉), uint8: the number of an even input in the lower half
    scale: Tensor  # (out, ⌈in / GROUP⌉), bfloat16
    inputs: int

    @classmethod
    def of(cls, q: Tensor, scale: Tensor) -> "Int4Weight":
        """Of whole numbers q (out, in) in any dtype."""
        halves = F.pad(q + _ZERO, (0, q.shape[1] % 2)).to(torch.uint8)
        return cls(halves[:, ::2] | halves[:, 1::2] << 4, scale, q.shape[1])

    @property
    def dense(self) -> Tensor:
        """q · s in float32."""
        halves = torch.stack([self.packed & 15, self.packed >> 4], -1)
        q = halves.flatten(1)[:, :self.inputs].float() - _ZERO
        return q * spread(self.scale, self.inputs).float()


def spread(scale: Tensor, inputs: int) -> Tensor:
    """(out, ⌈in / GROUP⌉) → (out, in): the scale of every number."""
    return scale.repeat_interleave(GROUP, 1)[:, :inputs]


def linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in x's dtype."""
    return F.linear(x, weight.dense.to(x.dtype), bias)
