"""What every launcher needs: matrices with contiguous rows, and `launch`."""

from dataclasses import replace
from math import prod

import torch
import triton
from torch import Tensor

from adacomcat.kernels import tiles


def as_matrix(x: Tensor) -> Tensor:
    """(..., d) → (rows, d) with contiguous rows; a view where the strides of x allow one."""
    return contiguous_rows(x.reshape(prod(x.shape[:-1]), x.shape[-1]))


def contiguous_rows(x: Tensor) -> Tensor:
    """x itself if its last stride is 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def stride(x: Tensor | None) -> int:
    """The row stride of a matrix; 0 without one."""
    return 0 if x is None else x.stride(0)


def one_stage_if_unaligned(tile: tiles.Tile, *matrices: Tensor | None) -> tiles.Tile:
    """The tile, with num_stages=1 on sm_90 and sm_100 if some matrix is not aligned to 16 elements.

    Args:
        matrices: the operands that one loop of the kernel loads and feeds to wgmma.

    Triton copies aligned tiles to shared memory asynchronously, unaligned ones through registers.
    wgmma needs a `fence.proxy.async` after stores from registers. If one loop has both kinds,
    triton 3.8 places that fence before the asynchronous copy has arrived, and none after it: a
    race, which the emulator in tests/gpu/ptx reports. With one stage all tiles pass through
    registers.
    """
    aligned = all(t is None or t.stride(0) % 16 == t.shape[1] % 16 == t.data_ptr() % 16 == 0
                  for t in matrices)
    return tile if aligned or tiles.target().arch not in (90, 100) else replace(tile, num_stages=1)


def launch(
    kernel: triton.runtime.jit.KernelInterface, grid: tuple[int, ...], x: Tensor, *args, **kwargs
) -> None:
    """Run `kernel` on the device of `x`; an empty grid is no launch."""
    if 0 in grid:
        return
    with torch.cuda.device_of(x):
        kernel[grid](*args, **kwargs)
