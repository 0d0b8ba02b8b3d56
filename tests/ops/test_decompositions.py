"""Decompositions against float64 LAPACK, closed forms and gradcheck; hard matrices; bad ones."""

import math

import pytest
import torch
from helpers.matrices import LOW_RANKS, check, hard, of_low_rank
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adacomcat.ops import backends
from adacomcat.ops.decompositions import (
    batched_svd,
    factored_svd,
    low_rank_approximation,
    singular_values,
    truncation_errors,
)

DTYPES = [torch.float32, torch.float64]
SHAPES = [(1, 1, 1), (5, 8, 8), (3, 17, 9), (2, 9, 33), (4, 64, 64), (2, 128, 128), (1, 300, 40),
          (0, 6, 4), (2, 7, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batched_svd(shape: tuple, dtype: torch.dtype, backend: str,
                     poisoned_memory: None) -> None:
    a = torch.randn(shape, dtype=dtype)
    for k in {0, 1, min(shape[1:]) // 2, min(shape[1:])}:
        check(a, *batched_svd(a, k))
    strided = a.mT.contiguous().mT
    for left, right in zip(batched_svd(strided), batched_svd(a), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 96), (128, 128), (200, 121)], ids=str)
def test_threads_and_neighbours_change_no_bit(shape: tuple, dtype: torch.dtype,
                                              backend: str) -> None:
    """Blocks of columns of a large matrix go to several threads."""
    if backend == "reference":
        pytest.skip("LAPACK's rounding depends on its threads")
    a = torch.randn(3, *shape, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = batched_svd(a[1:2])
        torch.set_num_threads(3)
        shared, together = batched_svd(a[1:2]), batched_svd(a)
    finally:
        torch.set_num_threads(threads)
    check(a[1:2], *alone)
    for one, other, all_three in zip(alone, shared, together, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, all_three[1:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["condition 1e12", "clusters", "rank 3", "huge", "tiny", "kahan",
                                  "zeros", "identity"])
def test_hard_matrices(name: str, dtype: torch.dtype, backend: str) -> None:
    for n in (8, 33):
        a = hard(name, n, dtype)
        check(a, *batched_svd(a), factor=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOW_RANKS)
def test_low_ranks(name: str, dtype: torch.dtype, backend: str) -> None:
    """A pivoted QR leaves rounding errors of rounding errors, down to numbers without squares."""
    for m, n in ((4, 6), (8, 8), (64, 64), (100, 128), (130, 40)):
        a = torch.stack([of_low_rank(name, m, n, dtype) for _ in range(3)])
        check(a, *batched_svd(a), factor=4)
        torch.testing.assert_close(singular_values(a), batched_svd(a)[1])
        check(a, *low_rank_approximation(a), factor=8)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0), (2, 3, 0), (0, 3, 0), (2, 0, 3)],
                         ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_matrices_have_empty_factors(shape: tuple, dtype: torch.dtype, backend: str) -> None:
    a = torch.zeros(shape, dtype=dtype)
    *lead, m, n = shape
    for op in (batched_svd, low_rank_approximation):
        assert [tuple(t.shape) for t in op(a)] == [(*lead, m, 0), (*lead, 0), (*lead, n, 0)]
    assert singular_values(a).shape == (*lead, 0)
    product = factored_svd(a, torch.zeros(*lead, 5, n, dtype=dtype), 0)
    assert [tuple(t.shape) for t in product] == [(*lead, m, 0), (*lead, 0), (*lead, 5, 0)]
    assert torch.equal(truncation_errors(a), torch.zeros(*lead, n + 1, dtype=dtype))


@pytest.mark.parametrize("exponent", [-17, -19, -21, -23, -30])
def test_columns_whose_squares_are_no_floats(exponent: int, backend: str) -> None:
    """They keep their relative accuracy, and all vectors are orthonormal."""
    q = torch.linalg.qr(torch.randn(12, 7, dtype=torch.float64)).Q
    d = 10.0 ** torch.tensor([0, -1, exponent, exponent, exponent - 2, exponent - 4, -36]).double()
    a = (q * d)[:, torch.randperm(7)].float()
    u, s, v = batched_svd(a)
    check(a, u, s, v)
    if backend != "reference":  # LAPACK promises absolute accuracy only
        exact = d.sort(descending=True).values
        assert ((s.double() - exact).abs() / exact).max() < 64 * torch.finfo(torch.float32).eps
    few = batched_svd(a.mT, 3)
    check(a.mT, *few)


@pytest.mark.parametrize("exponent", [-140, -150, -160, -170, -300])
def test_columns_whose_squares_are_no_doubles(exponent: int, backend: str) -> None:
    """Below 1e-146 of the largest they count as zero."""
    a = torch.randn(40, 30, dtype=torch.float64)
    a[:, ::2] *= 10.0 ** exponent
    check(a, *batched_svd(a))
    check(a.mT, *batched_svd(a.mT, 20))


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_low_rank_approximation_at_the_ends_of_the_range(scale: float) -> None:
    """Where a Gram matrix overflows or vanishes."""
    a = torch.randn(30, 20, dtype=torch.float64)
    u, s, v = low_rank_approximation(a * scale)
    check(a, u, s / scale, v, factor=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("end", ["denormal", "largest"])
def test_the_ends_of_the_range(end: str, dtype: torch.dtype, backend: str) -> None:
    """Where squares underflow or overflow. The check sees it all at scale 1."""
    info = torch.finfo(dtype)
    exponent = math.frexp(info.tiny)[1] - 3 if end == "denormal" else math.frexp(info.max)[1] - 8
    half = exponent // 2

    def at_scale(t: Tensor, sign: int) -> Tensor:
        return t * 2.0 ** (sign * half) * 2.0 ** (sign * (exponent - half))

    a = at_scale(hard("clusters", 12, torch.float64), 1).to(dtype)
    u, s, v = batched_svd(a)
    check(at_scale(a.double(), -1).to(dtype), u, at_scale(s.double(), -1).to(dtype), v, factor=4)


@pytest.mark.parametrize("n", [70, 100, 127, 128])
def test_graded_columns_of_many_blocks(n: int, backend: str) -> None:
    """As below, where the columns are too many for a cache and are rotated block by block."""
    if backend == "reference":
        pytest.skip("LAPACK promises absolute accuracy only")
    q = torch.linalg.qr(torch.randn(n + 5, n, dtype=torch.float64)).Q
    d = torch.logspace(0, -60, n, dtype=torch.float64)
    _, s, _ = batched_svd((q * d)[:, torch.randperm(n)])
    assert ((s - d).abs() / d).max() < 256 * torch.finfo(torch.float64).eps
    a = torch.randn(2, n, n, dtype=torch.float64)
    check(a, *batched_svd(a))


def test_graded_columns_keep_small_singular_values(backend: str) -> None:
    """A = Q D with Q orthonormal: the singular values are D, each to high relative accuracy;
    LAPACK, which the reference is, promises absolute accuracy only."""
    for dtype, least in ((torch.float32, -15), (torch.float64, -60)):
        q = torch.linalg.qr(torch.randn(40, 24, dtype=torch.float64)).Q
        d = torch.logspace(0, least, 24, dtype=torch.float64)
        a = (q * d)[:, torch.randperm(24)].to(dtype)
        _, s, _ = batched_svd(a)
        scale = d[0] if backend == "reference" else d
        assert ((s.double() - d).abs() / scale).max() < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_numbers_are_named(value: float, backend: str) -> None:
    a = torch.randn(5, 8, 8)
    a[3, 2, 1] = value
    with pytest.raises(ValueError, match="matrix 3 of 5.*NaN or infinite"):
        batched_svd(a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factored_svd_is_that_of_the_product(dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 50, 12, dtype=dtype), torch.randn(3, 70, 12, dtype=dtype)
    check(a @ b.mT, *factored_svd(a, b, 7), factor=4)
    root_a = torch.randn(50, 50, dtype=dtype) / 7
    root_b = torch.randn(70, 70, dtype=dtype) / 8
    check((root_a @ a) @ (root_b @ b).mT, *factored_svd(a, b, 12, root_a, root_b), factor=16)


@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (2, 30, 30)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_approximation(shape: tuple, dtype: torch.dtype) -> None:
    a = torch.randn(shape, dtype=dtype)
    check(a, *low_rank_approximation(a, 11), factor=4)


def test_truncation_errors_are_the_tails() -> None:
    s = torch.rand(2, 3, 6, dtype=torch.float64).sort(-1, descending=True).values
    errors = truncation_errors(s)
    for rank in range(7):
        expected = s[..., rank:].square().sum((-1, -2))
        torch.testing.assert_close(errors[..., rank], expected)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("shape", [(4, 4), (6, 4), (2, 4, 5)], ids=str)
def test_gradients(shape: tuple, k: int) -> None:
    a = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    b = torch.randn(*shape[:-2], 7, shape[-1], dtype=torch.float64, requires_grad=True)
    for op in (batched_svd, low_rank_approximation):
        assert torch.autograd.gradcheck(lambda a, op=op: op(a, k), (a,))
    assert torch.autograd.gradcheck(lambda a, b: factored_svd(a, b, k), (a, b))
    s = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(truncation_errors, (s,))


def test_equal_singular_values_have_no_vectors_to_differentiate() -> None:
    a = torch.eye(4, dtype=torch.float64, requires_grad=True)
    u, s, _ = batched_svd(a, 2)
    s.sum().backward(retain_graph=True)  # values alone are fine
    assert a.grad.isfinite().all()
    with pytest.raises(ValueError, match="singular values 0 and 1 .* are equal"):
        u.sum().backward()


@pytest.mark.parametrize("call, message", [
    (lambda: batched_svd(torch.randn(3)), "must be a matrix"),
    (lambda: batched_svd(torch.randn(3, 4), 4), "k must lie in 0 … 3"),
    (lambda: batched_svd(torch.randn(3, 4).half()), "cast it to float32"),
    (lambda: factored_svd(torch.randn(3, 4), torch.randn(3, 5)), "b must have shape"),
], ids=["vector", "rank", "half", "factors"])
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_ops_pass_opcheck() -> None:
    a, b = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    ops = torch.ops.adacomcat
    for op, args in ((ops.batched_svd, (a, 3)), (ops.low_rank_approximation, (a, 3)),
                     (ops.factored_svd, (a, b, 3)), (ops.truncation_errors, (torch.rand(3, 5),))):
        torch.library.opcheck(op.default, args)


def test_fake_tensors_have_the_shapes(backend: str) -> None:
    with FakeTensorMode():
        shapes = [tuple(t.shape) for t in batched_svd(torch.randn(3, 6, 4), 2)]
    assert shapes == [(3, 6, 2), (3, 2), (3, 4, 2)]


def test_the_kernel_takes_what_is_narrow() -> None:
    if backends.available()["cpp"] is not None:
        pytest.skip(str(backends.available()["cpp"]))
    assert backends.pick("batched_svd", torch.empty(2, 500, 128)) == "cpp"
    assert backends.pick("batched_svd", torch.empty(2, 129, 129)) == "reference"
    assert "129" in backends.refusal("cpp", "batched_svd", torch.empty(2, 129, 129))

