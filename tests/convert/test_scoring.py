"""Error curves of a whole model: against dense products, on many threads, and their memory."""

from collections.abc import Iterator

import pytest
import timm
import torch
from helpers.memory import allocation_peak
from torch import Tensor, nn

from adacomcat.convert.factors import error_curves, factorize_model
from adacomcat.factorize.linalg import triangle
from adacomcat.ops import backends
from adacomcat.ops.decompositions import gram
from adacomcat.sites import find_sites
from adacomcat.utils.parallel_map import side_by_side

WIDTH, HEADS = 192, 3


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def small_model(depth: int = 2) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=depth, num_classes=10).eval()


def dense_spectra(model: nn.Module, name: str) -> Tensor:
    """Singular values of the matrices of a site, of the dense products where there are heads."""
    prefix, _, part = name.rpartition(".")
    module = model.get_submodule(prefix if part in ("qk", "vo") else name)
    if part not in ("qk", "vo"):
        return torch.linalg.svdvals(module.weight.double()).unsqueeze(0)
    q, k, v = (w.double().unflatten(0, (HEADS, -1)) for w in module.qkv.weight.chunk(3))
    bias = module.qkv.bias.double()[:WIDTH].reshape(HEADS, -1, 1)
    out = module.proj.weight.double().unflatten(1, (HEADS, -1)).transpose(0, 1)
    products = torch.cat([q, bias], -1).mT @ k * module.scale if part == "qk" else out @ v
    return torch.linalg.svdvals(products)[:, :WIDTH // HEADS]


@torch.no_grad()
def test_curves_are_those_of_the_dense_products(two_threads: None) -> None:
    model = small_model()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            nn.init.normal_(parameter)
    curves = error_curves(model)
    assert set(curves) == {site.name for site in find_sites(model)}
    for name, curve in curves.items():
        spectra = dense_spectra(model, name)
        for rank in (0, 1, spectra.shape[1] // 2, spectra.shape[1] - 1):
            torch.testing.assert_close(curve[rank], spectra[:, rank:].square().sum(), rtol=1e-9,
                                       atol=0)
    assert torch.get_num_threads() == 2


def test_curves_are_those_of_the_factors(two_threads: None) -> None:
    model = small_model()
    curves = error_curves(model)
    for name, factors in factorize_model(model).items():
        torch.testing.assert_close(curves[name], factors.errors, rtol=1e-9, atol=1e-9)


def test_memory_is_that_of_one_layer() -> None:
    """The peak is below twice a layer's weights, and no tensor is as large as d × d × heads."""
    model = small_model(depth=3)
    layer = sum(p.numel() * 4 for p in model.blocks[0].attn.parameters())
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees its own thread
    try:
        peak, largest = allocation_peak(lambda: error_curves(model))
    finally:
        torch.set_num_threads(before)
    assert layer / 2 < peak < 2 * layer, f"{peak / layer:.2f} times a layer's weights"
    assert largest < HEADS * WIDTH**2 * 8


def test_the_peak_of_memory_is_counted(two_threads: None) -> None:
    """Two tensors live together, the third after them."""
    def run() -> None:
        both = torch.empty(1000), torch.empty(3000)
        del both
        torch.empty(2000)

    assert allocation_peak(run) == (16000, 12000)
    assert allocation_peak(lambda: None) == (0, 0)


def test_gram_of_half_precision() -> None:
    """No kernel takes it; tests/ops/test_spectra.py has the others."""
    a = torch.randn(700, 130).bfloat16()
    torch.testing.assert_close(gram(a), a.double().mT @ a.double(), rtol=1e-12, atol=1e-11)


def test_triangle_keeps_the_digits_of_ill_conditioned_factors() -> None:
    q = torch.linalg.qr(torch.randn(60, 6, dtype=torch.float64)).Q
    scales = torch.logspace(0, -10, 6, dtype=torch.float64)
    values = torch.linalg.svdvals(triangle(q * scales))
    torch.testing.assert_close(values, scales, rtol=1e-5, atol=0)


def test_threads_see_the_choices_of_their_caller(two_threads: None) -> None:
    with backends.use_backend("reference"), torch.no_grad():
        seen = side_by_side(lambda i: (i, backends.in_use(), torch.is_grad_enabled(),
                                       torch.get_num_threads()), range(5), "looking")
    assert seen == [(i, "reference", False, 1) for i in range(5)]


def test_an_error_on_a_thread_is_raised_and_threads_come_back(two_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda i: 1 // i, range(3), "dividing")
    assert torch.get_num_threads() == 2
