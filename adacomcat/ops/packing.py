"""Weights packed once for the CPU kernels, by who owns them.

The kernels take each weight as a matrix, which they pack for the call, or packed already: a tensor
of bytes with a header and the panels that a product reads. Here weights are packed and read back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adacomcat.ops import backends

_PARTS = 3  # of a float32 in bfloat16 (AMX): their sum is the value


@dataclass(frozen=True)
class Form:
    """How a packed weight is read back.

    Attributes:
        shape: Of the weight.
        dtype: Of the weight.
        transposed: Whether ops multiply by the weight's transpose.
        start: Bytes before the panels.
        width: Columns of a panel.
        rows: Of a panel; those behind the matrix are zeros.
        group: Rows that are adjacent in each column.
        size: Bytes of an element.
        lossy: Whether packing rounds.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool
    start: int
    width: int
    rows: int
    group: int
    size: int
    lossy: int

    def read(self, data: Tensor) -> Tensor:
        """The weight, a new tensor. The last panel may have half of the width."""
        k, n = self.shape[::-1] if self.transposed else self.shape
        whole, rest = divmod(n, self.width)
        full = self.start + whole * self.rows * self.width * self.size
        panels = [self._panels(data[self.start:full], whole, self.width)]
        if rest:
            last = self.width // 2 if rest <= self.width // 2 else self.width
            panels.append(self._panels(data[full:], 1, last))
        b = torch.cat(panels, 1)[:k, :n]
        return (b.t() if self.transposed else b).to(self.dtype).contiguous()

    def _panels(self, data: Tensor, count: int, width: int) -> Tensor:
        """(rows, count · width)."""
        if self.size == 2 * _PARTS:  # of each 32 rows three parts, in registers of 16 columns
            parts = data.view(torch.bfloat16).float().view(
                count, self.rows // 32, _PARTS, width // 16, 16, 16, 2)
            values = parts[:, :, 0] + parts[:, :, 1] + parts[:, :, 2]
            # (panel, block, register, row, column, half) → (block, half, row, panel, …)
            return values.permute(1, 5, 3, 0, 2, 4).reshape(self.rows, count * width)
        dtype = torch.float32 if self.size == 4 else torch.bfloat16
        panels = data.view(dtype).view(count, self.rows // self.group, width, self.group)
        return panels.permute(1, 3, 0, 2).reshape(self.rows, count * width)


def pack(weight: Tensor, transposed: bool, scale: Tensor | None = None
         ) -> tuple[Tensor, Form | None] | None:
    """A matrix packed for products with it, or with its transpose.

    The engine is that of the weight's dtype, of the CPU, and of the precision that
    ``torch.set_float32_matmul_precision`` allows now.

    Returns:
        What ops take in the place of the weight, and the form to read it back by: None where
        digits are lost. None where no kernel takes the weight.
    """
    if scale is not None:
        return None
    supported = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (backends.build_info() and weight.is_cpu and supported and weight.numel()):
        return None
    rows, columns = weight.shape
    data = torch.ops.adacomcat.pack_weight_cpu(weight.detach(), transposed)
    form = Form((rows, columns), weight.dtype, transposed,
                *torch.ops.adacomcat.packed_layout_cpu(data))
    exact = not form.lossy and torch.equal(form.read(data), weight)
    return data, form if exact else None
