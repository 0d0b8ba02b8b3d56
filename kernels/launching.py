"""What every launcher needs: rows, contiguity, and a launch that knows empty grids."""

from math import prod

import torch
import triton
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """(..., d) → (rows, d) whose elements within a row are adjacent; a view where there is one."""
    return adjacent(x.reshape(prod(x.shape[:-1]), x.shape[-1]))


def adjacent(x: Tensor | None) -> Tensor | None:
    """x itself if the elements of a row are adjacent, else a contiguous copy."""
    if x is None or x.stride(-1) == 1:
        return x
    return x.contiguous()


def stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def launch(
    kernel: triton.runtime.jit.KernelInterface, grid: tuple[int, ...], x: Tensor, *args, **kwargs
) -> None:
    """Run `kernel` on the device of `x`; an empty grid has nothing to compute."""
    if 0 in grid:
        return
    with torch.cuda.device_of(x):
        kernel[grid](*args, **kwargs)
