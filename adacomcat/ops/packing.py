"""Weights packed once for the CPU kernels, by who owns them.

The kernels take each weight as a matrix, which they pack for the call, or packed already: a tensor
of bytes with a header and the panels that a product reads. Here weights are packed and read back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adacomcat.ops import backends, extension

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
        scale_rows: Of a panel's last rows, those that hold a scale for each column.
        zero: What is added to integers.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool
    start: int
    width: int
    rows: int
    group: int
    size: int
    scale_rows: int
    zero: int

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
        if self.size == 1:
            return self._integers(data.view(count, self.rows, width))
        dtype = torch.float32 if self.size == 4 else torch.bfloat16
        panels = data.view(dtype).view(count, self.rows // self.group, width, self.group)
        return panels.permute(1, 3, 0, 2).reshape(self.rows, count * width)

    def _integers(self, panels: Tensor) -> Tensor:
        """(rows without scales, count · width), of panels of bytes (count, rows, width)."""
        count, _, width = panels.shape
        rows = self.rows - self.scale_rows
        scales = panels[:, rows:].reshape(count, self.scale_rows * width).view(torch.float32)
        groups = panels[:, :rows].reshape(count, rows // self.group, width, self.group)
        stored = groups.to(torch.int32) if self.zero else groups.view(torch.int8)
        values = (stored - self.zero).float() * scales.view(count, 1, width, 1)
        return values.permute(1, 3, 0, 2).reshape(rows, count * width)


def pack(weight: Tensor, transposed: bool,
         scale: Tensor | None = None) -> tuple[Tensor, Form | None] | None:
    """A matrix packed for products with it, or with its transpose.

    The engine is that of the weight's dtype, of the CPU, and of the precision that
    ``torch.set_float32_matmul_precision`` allows now. With scales it is the one for 8 bits, which
    rounds the rows of x to integers too.

    Args:
        weight: (rows, columns).
        transposed: Whether ops multiply by the weight's transpose.
        scale: float32, one for each output: for each row of the weight if it is transposed, else
            for each column. The weight / scale is whole, from -127 to 127.

    Returns:
        What ops take in the place of the weight, and the form to read it back by: None where
        digits are lost. None where no kernel takes the weight.
    """
    supported = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (backends.build_info() and weight.is_cpu and supported and weight.numel()):
        return None
    rows, columns = weight.shape
    extension.follow_precision()
    if scale is None:
        data = torch.ops.adacomcat.pack_weight_cpu(weight.detach(), transposed)
    else:
        data = torch.ops.adacomcat.pack_int8_weight_cpu(weight.detach(), scale, transposed)
    form = Form((rows, columns), weight.dtype, transposed,
                *torch.ops.adacomcat.packed_layout_cpu(data))
    lossy = form.scale_rows > 0 and scale is None
    exact = not lossy and torch.equal(form.read(data), weight)
    return data, form if exact else None
