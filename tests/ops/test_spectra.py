"""Spectra without vectors, against numpy in float64: on every instruction set, on hard matrices."""

import math

import numpy as np
import pytest
import timm
import torch
from helpers.matrices import hard
from torch import Tensor

from adacomcat.convert.factors import SPECTRA, decompose_site
from adacomcat.ops import backends
from adacomcat.ops.decompositions import batched_svd, eigenvalues, gram, singular_values
from adacomcat.sites import find_sites

HARD = ["condition 1e12", "clusters", "rank 3", "huge", "tiny", "kahan", "zeros", "identity"]


def symmetric(n: int) -> Tensor:
    a = torch.randn(n, n, dtype=torch.float64)
    return a + a.mT


def assert_eigenvalues(a: Tensor) -> None:
    exact = torch.from_numpy(np.linalg.eigvalsh(a.numpy()))
    bound = 16 * torch.finfo(torch.float64).eps * math.sqrt(a.shape[-1])
    found = eigenvalues(a)
    assert found.shape == exact.shape and (found.diff() >= 0).all()
    assert ((found - exact).abs() <= bound * exact.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 31, 32, 33, 65, 130, 256])
def test_eigenvalues(n: int, backend: str, poisoned_memory: None) -> None:
    assert_eigenvalues(symmetric(n))
    assert_eigenvalues(torch.stack([symmetric(n) for _ in range(3)]))


@pytest.mark.parametrize("name", HARD)
def test_eigenvalues_of_hard_matrices(name: str, backend: str, poisoned_memory: None) -> None:
    for n in (8, 33, 70):
        a = hard(name, n, torch.float64)
        assert_eigenvalues(a @ a.mT)
        assert_eigenvalues(a + a.mT)


def test_eigenvalues_of_tridiagonal_matrices(backend: str) -> None:
    """Closed forms, Wilkinson's pairs that almost meet, and blocks that zeros divide."""
    n = 41
    beside = torch.ones(n - 1, dtype=torch.float64)
    second = torch.diag(beside, 1) + torch.diag(beside, -1)
    angles = torch.arange(n, 0, -1, dtype=torch.float64) * math.pi / (n + 1)
    torch.testing.assert_close(eigenvalues(second), 2 * angles.cos(), rtol=0, atol=1e-14)
    assert_eigenvalues(second + torch.diag((torch.arange(n) - n // 2).abs().double()))
    assert_eigenvalues(torch.block_diag(symmetric(5), torch.zeros(3, 3), symmetric(9)))


@pytest.mark.parametrize("exponent", [-1060, -700, 700, 1015])
def test_eigenvalues_at_the_ends_of_the_range(exponent: int, backend: str) -> None:
    a = symmetric(20)
    if backend == "reference" and exponent in (-1060, 1015):
        pytest.skip("LAPACK's own scaling decides")
    half = exponent // 2
    scaled = a * 2.0 ** half * 2.0 ** (exponent - half)
    found = eigenvalues(scaled) * 2.0 ** -half * 2.0 ** (half - exponent)
    # Denormal numbers have few bits.
    atol = 1e-3 if exponent == -1060 else 1e-13
    torch.testing.assert_close(found, torch.linalg.eigvalsh(a), rtol=0, atol=atol)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_eigenvalues(value: float) -> None:
    if backends.direct_kernel("eigenvalues", symmetric(3)) is None:
        pytest.skip("no kernel here")
    a = symmetric(12)
    a[4, 7] = a[7, 4] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        eigenvalues(a)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (700, 130), (40, 200), (2, 600, 65),
                                   (2, 3, 9, 17), (0, 3), (3, 0), (0, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gram(shape: tuple, dtype: torch.dtype, backend: str, poisoned_memory: None) -> None:
    a = torch.randn(shape).to(dtype)
    exact = a.double().mT @ a.double()
    for layout in (a, a.mT.contiguous().mT):
        torch.testing.assert_close(gram(layout), exact, rtol=1e-12, atol=1e-11)


def test_gram_is_the_same_on_two_threads(backend: str) -> None:
    a, before = torch.randn(300, 200), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gram(a)
        torch.set_num_threads(2)
        torch.testing.assert_close(gram(a), one, rtol=1e-13, atol=1e-12)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(3, 17, 9), (2, 9, 33), (4, 64, 64), (2, 3, 5, 5), (0, 6, 4)],
                         ids=str)
def test_singular_values_are_those_with_vectors(shape: tuple, backend: str,
                                                poisoned_memory: None) -> None:
    a = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(singular_values(a), batched_svd(a)[1])


@pytest.mark.parametrize("name", HARD)
def test_singular_values_of_hard_matrices(name: str, backend: str) -> None:
    a = hard(name, 33, torch.float64)
    exact = torch.from_numpy(np.linalg.svd(a.numpy(), compute_uv=False))
    torch.testing.assert_close(singular_values(a), exact, rtol=1e-13,
                               atol=1e-14 * exact[0].item())


def test_without_wide_vectors_the_library_does_it() -> None:
    if backends.available()["cpp"] is not None:
        pytest.skip(str(backends.available()["cpp"]))
    from adacomcat import _C
    here = backends.build_info()["instruction_set"]
    _C.use_instruction_set("generic")
    try:
        for op in ("gram", "eigenvalues"):
            assert "AVX2" in backends.refusal("cpp", op, symmetric(3))
            assert backends.direct_kernel(op, symmetric(3)) is None
        assert backends.direct_kernel("singular_values", symmetric(3)) is not None
    finally:
        _C.use_instruction_set(here)


@torch.no_grad()
@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4])
def test_spectra_of_a_model_to_five_digits(condition: float, backend: str) -> None:
    """All singular values, also of weights whose columns differ in size by the condition."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3).eval()
    for site in find_sites(model):
        if site.kind != "linear":
            continue
        weight = model.get_submodule(site.module).weight
        weight *= torch.logspace(0, -math.log10(condition), weight.shape[1])
        exact = np.linalg.svd(weight.double().numpy(), compute_uv=False)
        found = decompose_site(SPECTRA, model, site, {}, 0.0)[0]
        torch.testing.assert_close(found, torch.from_numpy(exact), rtol=1e-5, atol=0)
