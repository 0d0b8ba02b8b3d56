"""csrc/cuda/batched_svd.cu and truncation_errors.cu as host C++: against LAPACK in float64."""

import math

import cuda_calls
import cuda_host
import pytest
import torch
from cuda_host import Host
from helpers.matrices import LOW_RANKS, check, hard, of_low_rank
from helpers.tolerance import FLOOR, assert_close_to_float64, relative_error
from ptx.mutations import ALL_MUTANTS
from torch import Tensor

from adacomcat.ops import reference

pytestmark = pytest.mark.skipif(cuda_host.missing() is not None, reason=str(cuda_host.missing()))
DTYPES = [torch.float32, torch.float64]
# One warp a matrix up to width 32, one block beyond.
SHAPES = [(1, 1, 1), (5, 8, 8), (3, 17, 9), (2, 9, 33), (9, 6, 4), (2, 7, 1), (2, 1, 40),
          (3, 32, 32), (1, 128, 5), (1, 33, 33), (1, 40, 50), (1, 70, 65)]
SMALL = 8 * 1024  # bytes of shared memory


def product(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    return (u.double() * s.double().unsqueeze(-2)) @ v.double().mT


def check_truncated(a: Tensor, k: int, host: Host, **options: int) -> None:
    """The residual and orthogonality; signs; values and product not much worse than LAPACK's."""
    u, s, v, status = cuda_calls.batched_svd(host, a, k, **options)
    assert status.tolist() == [0] * len(a)
    check(a, u, s, v)
    exact, plain = (reference.batched_svd(t, k) for t in (a.double(), a))
    assert_close_to_float64(s, exact[1], plain[1], "s")
    found, exact, plain = (product(*parts) for parts in ((u, s, v), exact, plain))
    allowed = 2 * relative_error(plain, exact) + FLOOR + undetermined(a, k)
    assert relative_error(found, exact) <= allowed


def undetermined(a: Tensor, k: int) -> float:
    """ε σ₁ / (σ_k - σ_{k+1}): so far the arithmetic leaves a truncated product open, however it is
    computed; how much of it LAPACK shows differs from one CPU to another."""
    s = torch.linalg.svdvals(a.double())
    if k >= s.shape[-1]:
        return 0.0
    return (torch.finfo(a.dtype).eps * s[:, 0] / (s[:, k - 1] - s[:, k])).amax().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batched_svd(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a = torch.randn(shape, dtype=dtype)
    width = min(shape[1:])
    check_truncated(a, width, Host())
    for k in {1, width // 2 + 1}:
        check_truncated(a, k, Host(seed=k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_widest(dtype: torch.dtype) -> None:
    """Those of float64 have no room for the rotations in shared memory."""
    a = torch.randn(1, 128, 128, dtype=dtype)
    assert cuda_calls.needs_scratch(a, 227 * 1024) == (dtype == torch.float64)
    check_truncated(a, 128, Host())


@pytest.mark.parametrize("shape", [(2, 33, 34), (1, 60, 37)], ids=str)
def test_rotations_in_global_memory(shape: tuple[int, ...]) -> None:
    a = torch.randn(shape)
    assert cuda_calls.needs_scratch(a, SMALL)
    for dtype in DTYPES:
        check_truncated(a.to(dtype), min(shape[1:]), Host(seed=1), available=SMALL)


@pytest.mark.parametrize("shape", [(2, 12, 7), (1, 34, 40)], ids=str)
def test_strides(shape: tuple[int, ...]) -> None:
    """Transposed, and with gaps."""
    a = torch.randn(shape)
    expected = cuda_calls.batched_svd(Host(), a, 5)
    gaps = torch.zeros(2 * shape[0], 3 * shape[1], 2 * shape[2])
    gaps[::2, ::3, ::2] = a
    for same in (a.mT.contiguous().mT, gaps[::2, ::3, ::2]):
        actual = cuda_calls.batched_svd(Host(), same, 5)
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [8, 33])
def test_hard_matrices(n: int, dtype: torch.dtype) -> None:
    names = ("condition 1e12", "clusters", "rank 3", "huge", "tiny", "zeros", "identity")
    a = torch.stack([hard(name, n, dtype) for name in names])
    *found, status = cuda_calls.batched_svd(Host(seed=2), a, n)
    assert status.tolist() == [0] * len(names)
    for matrix, u, s, v in zip(a, *found, strict=True):
        check(matrix, u, s, v, factor=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (16, 16), (64, 64)], ids=str)
def test_low_ranks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a = torch.stack([of_low_rank(name, *shape, dtype) for name in LOW_RANKS])
    *found, status = cuda_calls.batched_svd(Host(seed=3), a, min(shape))
    assert status.tolist() == [0] * len(a)
    for matrix, u, s, v in zip(a, *found, strict=True):
        check(matrix, u, s, v, factor=4)


@pytest.mark.parametrize("dtype, exponents", [(torch.float32, (-15, -17, -19, -21, -23, -30)),
                                              (torch.float64, (-140, -150, -160, -300))], ids=str)
def test_columns_whose_squares_are_no_numbers(dtype: torch.dtype, exponents: tuple) -> None:
    """Such columns count as zero; the vectors are orthonormal all the same."""
    for exponent in exponents:
        a = torch.randn(1, 12, 9, dtype=torch.float64)
        a[..., ::2] *= 10.0 ** exponent
        for matrix in (a.to(dtype), a.mT.to(dtype)):
            u, s, v, status = cuda_calls.batched_svd(Host(), matrix, 9)
            assert status.tolist() == [0]
            check(matrix, u, s, v)


@pytest.mark.parametrize("dtype, least", [(torch.float32, -15), (torch.float64, -60)], ids=str)
def test_graded_columns_keep_small_singular_values(dtype: torch.dtype, least: int) -> None:
    q = torch.linalg.qr(torch.randn(40, 24, dtype=torch.float64)).Q
    d = torch.logspace(0, least, 24, dtype=torch.float64)
    a = (q * d)[:, torch.randperm(24)].to(dtype)[None]
    for matrix in (a, a.mT):
        _, s, _, _ = cuda_calls.batched_svd(Host(), matrix, 24)
        assert ((s.double() - d).abs() / d).max() < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_range_of_numbers(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for scale in (info.max / 32, info.tiny, info.tiny * info.eps * 64):
        a = (torch.rand(1, 9, 9, dtype=torch.float64) * scale).to(dtype)
        _, s, _, status = cuda_calls.batched_svd(Host(), a, 9)
        assert status.tolist() == [0]
        exact = torch.linalg.svdvals(a.double())
        unit = 32 * info.eps * exact.max() + 2 * info.tiny * info.eps
        assert ((s.double() - exact).abs() <= unit).all()


@pytest.mark.parametrize("n", [8, 34])
def test_values_that_are_not_numbers_are_named(n: int) -> None:
    a = torch.randn(6, n, n)
    a[1, 2, 1], a[3, n - 1, n - 1], a[4, 0, 0] = math.nan, math.inf, -math.inf
    assert cuda_calls.batched_svd(Host(), a, 3)[3].tolist() == [0, 1, 0, 1, 1, 0]


def test_sweeps_are_bounded() -> None:
    """With a single sweep allowed, a kernel says that it has not converged, and ends."""
    host = Host(sources=cuda_host.replaced("batched_svd.cu", "kMaxSweeps = 40", "kMaxSweeps = 1"))
    a = torch.stack([torch.eye(8), torch.randn(8, 8)])
    assert cuda_calls.batched_svd(host, a, 8)[3].tolist() == [0, 2]


@pytest.mark.parametrize(("mode", "shape"), [
    ("asan", (5, 9, 12)), ("asan", (1, 35, 33)), ("tsan", (5, 9, 12)),
    *([("tsan", (1, 35, 33))] if ALL_MUTANTS else [])], ids=str)
def test_batched_svd_under_sanitizers(mode: str, shape: tuple[int, ...]) -> None:
    """A zero column has vectors completed too."""
    a = torch.randn(shape)
    a[0, 3] = 0
    a[0, :, 5] = 0
    u, s, v, _ = cuda_calls.batched_svd(Host(mode, seed=1), a, min(shape[1:]))
    check(a, u, s, v)


@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 31), (2, 12, 32), (3, 1, 100), (6, 2, 0)],
                         ids=str)
def test_truncation_errors(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> None:
    s = torch.rand(shape, dtype=dtype).sort(-1, descending=True).values
    s = s * torch.logspace(0, -6, max(shape[2], 1), dtype=dtype)[: shape[2]]
    actual = cuda_calls.truncation_errors(Host(mode), s)
    expected = reference.truncation_errors(s.double())
    torch.testing.assert_close(actual, expected.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)
