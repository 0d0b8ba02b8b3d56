"""Reasons why a kernel does not take an input, of which ``backends`` makes its answers."""

from collections.abc import Callable

import torch
from torch import Tensor


def no_dtype(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why a kernel for these dtypes does not take x; None if it does."""
    if x.dtype in dtypes:
        return None
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"the kernel takes {names} and the input is {str(x.dtype).removeprefix('torch.')}"


def no_svd(x: Tensor, width: int, available: int,
           shared_memory: Callable[[int, int, int], int]) -> str | None:
    """Why the CUDA kernel does not decompose the matrices of x; None if it does.

    Args:
        x: (..., rows, columns).
        width: The kernel's limit for both sides.
        available: Bytes of shared memory that a block of the GPU can have.
        shared_memory: Bytes that a matrix of so many rows, columns and bytes an element needs.
    """
    rows, columns = x.shape[-2:]
    if max(rows, columns) > width:
        return (f"the kernel takes matrices up to {width} x {width} and this one is "
                f"{rows} x {columns}")
    needed = shared_memory(rows, columns, x.element_size())
    if needed > available:
        return (f"a matrix takes {needed} bytes of shared memory and a block of this GPU has "
                f"{available}")
    return None
