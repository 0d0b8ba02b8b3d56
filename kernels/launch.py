"""What every launcher needs: rows, contiguity, and a launch that knows empty grids."""

from dataclasses import replace
from math import prod

import torch
import triton
from torch import Tensor

from adacomcat.kernels import tiles


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


def staged_alike(tile: tiles.Tile, *matrices: Tensor | None) -> tiles.Tile:
    """The tile, of one stage where triton would copy the matrices of one loop in two ways.

    Asynchronous tensor cores see what was written before a fence. Triton 3.8 has one for what
    passes through registers, as unaligned tiles do; for an aligned one of the same loop, whose copy
    is still in flight then, it has no other (the race check finds it). With one stage all tiles
    pass through registers.
    """
    aligned = all(t is None or t.stride(0) % 16 == t.shape[1] % 16 == t.data_ptr() % 16 == 0
                  for t in matrices)
    return tile if aligned or tiles.target().arch not in (90, 100) else replace(tile, num_stages=1)


def launch(
    kernel: triton.runtime.jit.KernelInterface, grid: tuple[int, ...], x: Tensor, *args, **kwargs
) -> None:
    """Run `kernel` on the device of `x`; an empty grid has nothing to compute."""
    if 0 in grid:
        return
    with torch.cuda.device_of(x):
        kernel[grid](*args, **kwargs)

