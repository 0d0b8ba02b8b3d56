"""csrc/cuda/low_rank_linear.cu as host C++: both tiles, all types, ragged shapes, sanitizers."""

from math import prod
from typing import Any

import cuda_calls
import cuda_host
import pytest
import torch
from cuda_calls import ACTIVATIONS
from cuda_host import Host
from kernel_cases import UNITS, worst
from kernel_shapes import LINEAR
from torch import Tensor

from adacomcat.ops import reference

pytestmark = pytest.mark.skipif(cuda_host.missing() is not None, reason=str(cuda_host.missing()))
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# The multiprocessors with which the launchers take a tile: rows are few for 132, and many for one.
TILES = {"small": 132, "large": 1}
SHAPES = {name: (prod(lead), d, r, out) for name, (lead, d, r, out) in LINEAR.items()
          if prod(lead)} | {"two-tiles": (70, 40, 136, 264)}

def host(tile: str, mode: str = "quick", seed: int = 0) -> Host:
    return Host(mode, seed=seed, multiprocessors=TILES[tile])


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    m, k, r, n = shape
    tensors = {"x": torch.randn(m, k), "v": torch.randn(k, r) / max(k, 1) ** 0.5,
               "u": torch.randn(n, r) / max(r, 1) ** 0.5, "bias": torch.randn(n),
               "residual": torch.randn(m, n)}
    return {name: t.to(dtype) for name, t in tensors.items()}


def complaints(found: tuple[Tensor, Tensor], tensors: dict[str, Tensor], activation: str | None,
               dtype: str) -> list[str]:
    """The complaints of `worst` about y and x V, against `reference.low_rank_linear`."""
    double = {name: t.double() for name, t in tensors.items()}
    results = (found, reference.low_rank_linear(**double, activation=activation),
               reference.low_rank_linear(**tensors, activation=activation))
    actual, exact, plain = ({"y": y, "middle": middle} for y, middle in results)
    return worst(actual, exact, plain, UNITS[dtype])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_low_rank_linear(shape: tuple[int, int, int, int], dtype: str, tile: str) -> None:
    tensors = draw(shape, TYPES[dtype])
    activation = ACTIVATIONS[list(SHAPES.values()).index(shape) % len(ACTIVATIONS)]
    found = cuda_calls.low_rank_linear(host(tile, seed=1), **tensors, activation=activation,
                                      keep_intermediates=True)
    assert complaints(found, tensors, activation, dtype) == []


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TYPES)
def test_activations_without_bias_and_residual(dtype: str, activation: str | None) -> None:
    tensors = draw((33, 24, 10, 20), TYPES[dtype])
    plain = {name: tensors[name] for name in "xvu"}
    y, middle = cuda_calls.low_rank_linear(Host("quick"), **plain, activation=activation)
    assert middle.numel() == 0
    _, middle = cuda_calls.low_rank_linear(
        Host("quick"), **plain, activation=activation, keep_intermediates=True)
    assert complaints((y, middle), plain, activation, dtype) == []


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_that_lie_apart(dtype: str) -> None:
    """Row strides at multiples of 16 bytes, and off them."""
    tensors = draw((20, 48, 16, 24), TYPES[dtype])
    expected = cuda_calls.low_rank_linear(Host("quick"), **tensors)[0]
    for gap in (8, 3):
        apart: dict[str, Any] = {
            name: torch.cat([t, t.new_full((len(t), gap), torch.nan)], 1)[:, : t.shape[1]]
            if t.dim() == 2 else t for name, t in tensors.items()}
        assert torch.equal(cuda_calls.low_rank_linear(Host("quick"), **apart)[0], expected)


def test_infinite_numbers_stay_in_their_row() -> None:
    tensors = draw((5, 16, 3, 9), torch.float16)
    expected = cuda_calls.low_rank_linear(Host("quick"), **tensors)[0]
    tensors["x"][1, 2], tensors["x"][3, 4] = torch.inf, torch.nan
    y = cuda_calls.low_rank_linear(Host("quick"), **tensors)[0]
    assert torch.equal(y[::2], expected[::2])
    assert not y[[1, 3]].isfinite().any()
    plain = reference.low_rank_linear(**tensors)[0]
    assert torch.equal(y.isnan(), plain.isnan())


@pytest.mark.parametrize("mode", ["asan", "tsan"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("shape", [(70, 72, 40, 144), (19, 33, 21, 131)], ids=str)
def test_under_sanitizers(shape: tuple[int, int, int, int], dtype: str, tile: str,
                          mode: str) -> None:
    """The first shape is copied 16 bytes at a time, the second one element by element."""
    tensors = draw(shape, TYPES[dtype])
    found = cuda_calls.low_rank_linear(host(tile, mode, seed=3), **tensors, activation="gelu",
                                      keep_intermediates=True)
    assert complaints(found, tensors, "gelu", dtype) == []
