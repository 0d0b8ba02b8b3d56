"""The tolerance of all tests: twice the error of plain PyTorch, both against float64."""

import torch
from torch import Tensor

# Relative error that is rounding and nothing else.
FLOOR = 1e-6


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||, computed in float64."""
    exact = exact.double()
    scale = exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return ((actual.double() - exact).norm() / scale).item()


def assert_close_to_float64(actual: Tensor, exact: Tensor, plain: Tensor, what: str = "") -> None:
    """At most twice the error of plain PyTorch at the same dtype, both against float64."""
    assert actual.shape == exact.shape, f"{what}: {actual.shape} is not {exact.shape}"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype} is not {plain.dtype}"
    if exact.numel() == 0:
        return
    error, allowed = relative_error(actual, exact), 2 * relative_error(plain, exact) + FLOOR
    assert error <= allowed, f"{what}: relative error {error:.2e} exceeds {allowed:.2e}"
