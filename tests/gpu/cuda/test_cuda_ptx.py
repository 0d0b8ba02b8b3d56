"""What nvcc gives to ptxas of csrc/cuda, executed for sm_80 and sm_90: results, bounds, races."""

from itertools import product

import cuda_calls
import cuda_ptx
import pytest
import torch
from cuda_calls import ACTIVATIONS
from cuda_host import Host
from cuda_ptx import Emulated
from helpers.matrices import check
from ptx.mutations import ALL_MUTANTS
from test_cuda_low_rank_linear import TILES, TYPES, complaints, draw

from adacomcat.ops import reference

pytestmark = pytest.mark.skipif(cuda_ptx.missing() is not None, reason=str(cuda_ptx.missing()))
ARCHITECTURES = ("sm_80", "sm_90")
# Copied 16 bytes at a time; element by element; several tiles of ranks and of columns; sums so long
# that errors which do not average out would show.
SHAPES = {"aligned": (70, 72, 40, 144), "odd": (19, 33, 21, 131), "wide": (18, 40, 136, 264),
          "long": (9, 1000, 24, 40)}


@pytest.mark.parametrize("shape, dtype, tile, architecture", [
    cell for at, cell in enumerate(product(SHAPES, TYPES, TILES, ARCHITECTURES))
    if ALL_MUTANTS or at // 2 % 2 == at % 2])
def test_low_rank_linear(shape: str, dtype: str, tile: str, architecture: str) -> None:
    tensors = draw(SHAPES[shape], TYPES[dtype])
    emulated = Emulated(architecture, multiprocessors=TILES[tile])
    found = cuda_calls.low_rank_linear(emulated, **tensors, activation="gelu",
                                       keep_intermediates=True)
    assert complaints(found, tensors, "gelu", dtype) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str | None, architecture: str) -> None:
    """Far from zero too, where one part of an approximation is not in use."""
    tensors = draw((9, 8, 4, 40), torch.float32)
    tensors["x"] *= torch.logspace(-3, 3, 9).unsqueeze(1)
    plain = {name: tensors[name] for name in "xvu"}
    found = cuda_calls.low_rank_linear(Emulated(architecture), **plain, activation=activation,
                                       keep_intermediates=True)
    assert complaints(found, plain, activation, "fp32") == []


@pytest.mark.parametrize(("dtype", "architecture"), [
    (torch.float32, "sm_80"), (torch.float64, "sm_90"),
    *([(torch.float32, "sm_90"), (torch.float64, "sm_80")] if ALL_MUTANTS else [])], ids=str)
@pytest.mark.parametrize("shape", [(5, 9, 7), (2, 3, 12), (1, 34, 33)], ids=str)
def test_batched_svd(shape: tuple[int, ...], dtype: torch.dtype, architecture: str) -> None:
    a = torch.randn(shape, dtype=dtype)
    a[0, :, 1] = 0
    k = min(shape[1:])
    u, s, v, status = cuda_calls.batched_svd(Emulated(architecture), a, k)
    assert status.tolist() == [0] * len(a)
    check(a, u, s, v)
    # The shim computes the same; only fused multiply-adds round otherwise.
    other = cuda_calls.batched_svd(Host(), a, k)[1]
    torch.testing.assert_close(s, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_that_are_not_numbers_are_named(architecture: str) -> None:
    a = torch.randn(3, 4, 5)
    a[1, 2, 1] = torch.nan
    assert cuda_calls.batched_svd(Emulated(architecture), a, 2)[3].tolist() == [0, 1, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 31), (2, 12, 32), (3, 1, 100)], ids=str)
def test_truncation_errors(shape: tuple[int, ...], dtype: torch.dtype, architecture: str) -> None:
    s = torch.rand(shape, dtype=dtype).sort(-1, descending=True).values
    expected = reference.truncation_errors(s.double()).to(dtype)
    torch.testing.assert_close(cuda_calls.truncation_errors(Emulated(architecture), s), expected,
                               rtol=4 * torch.finfo(dtype).eps, atol=0)
