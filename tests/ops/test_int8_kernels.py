"""Products with weights of 8 bits: integer sums are exact, scales cost float32's rounding."""

import math

import numpy as np
import pytest
import torch
from helpers.cpu_cases import ALL
from helpers.op_cases import convert
from helpers.tolerance import relative_error
from torch import Tensor

from adacomcat.ops import backends, packing
from adacomcat.ops.registry import OPS

pytestmark = pytest.mark.skipif(not backends.build_info(), reason="no C++ extension")

DEPTH = 4096  # of a product whose rows have one scale


def quantized(weight: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """The weight on its grid of 255 values, and its scales along dimension ``outputs``."""
    scale = weight.abs().amax(1 - outputs, keepdim=True) / 127
    grid = (weight / scale.where(scale > 0, torch.ones(()))).round() * scale
    return grid, scale.flatten()


def rounded_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers (m, k) of each row in int64, and its scale (m, 1), by float32's steps."""
    most = np.abs(x).max(1, keepdims=True, initial=0).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(most >= np.float32(1e-35), np.float32(127) / most, np.float32(0))
    return np.rint(x * inverse).astype(np.int64), most / np.float32(127)


def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (m, k) times the weight (k, n) with scales (n), by whole numbers, in float64."""
    rows, row_scale = rounded_rows(x.float().numpy())
    columns = np.rint(weight.double().numpy()
                      / np.where(scale > 0, scale, 1).astype(np.float64)).astype(np.int64)
    assert np.abs(columns).max(initial=0) <= 127
    return torch.from_numpy((rows @ columns) * row_scale.astype(np.float64)
                            * scale.double().numpy())


def multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The same by the kernel: the intermediate x V of a low-rank layer."""
    kernel = backends.direct_kernel("low_rank_linear", x)
    assert kernel is not None
    v = packing.pack(weight, False, scale)
    u = packing.pack(torch.eye(weight.shape[1], dtype=weight.dtype), True,
                     torch.full((weight.shape[1],), 1 / 127))
    assert v is not None and u is not None
    middle = torch.ops.adacomcat.low_rank_linear_cpu(x, v[0], u[0], None, None, None,
                                                       keep_intermediates=True)[1]
    return middle


SHAPES = [(1, 1, 1), (5, 3, 2), (7, 64, 33), (13, 197, 31), (197, 384, 32), (12, 32, 64),
          (270, 65, 130), (6, 4096, 17), (3, 1030, 48)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_integers_are_exact(shape: tuple[int, int, int], instruction_set: str) -> None:
    """With scales that are powers of two, every result below 2^24 is a float32."""
    m, k, n = shape
    torch.manual_seed(m * k + n)
    most = min(127, math.isqrt(2**24 // k))
    x = torch.randint(-most, most + 1, (m, k)).float()
    x[:, 0] = 127  # so that the scale of each row is 1
    weight = torch.randint(-most, most + 1, (k, n)).float()
    scale = torch.exp2(torch.randint(-8, 8, (n,)).float())
    assert torch.equal(multiply(x, weight * scale, scale).double(),
                       (x.double() @ weight.double()) * scale.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_those_of_whole_numbers(shape: tuple[int, int, int],
                                               instruction_set: str) -> None:
    m, k, n = shape
    torch.manual_seed(m + k * n)
    x = torch.randn(m, k) * torch.randn(m, 1).exp()
    weight, scale = quantized(torch.randn(k, n), 1)
    actual, exact = multiply(x, weight, scale), product(x, weight, scale)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max())


def test_extreme_numbers_are_exact(instruction_set: str) -> None:
    """All at the ends of the range, so that any narrow sum would overflow."""
    for k in (64, DEPTH):
        signs = torch.randint(0, 2, (4, k), generator=torch.Generator().manual_seed(k)) * 2. - 1
        x = torch.cat([torch.ones(1, k), -torch.ones(1, k), signs]) * 127
        weight = torch.cat([torch.ones(1, k), -torch.ones(1, k), signs]).t() * 127
        exact = x.double() @ weight.double()
        found = multiply(x, weight, torch.ones(6))
        torch.testing.assert_close(found.double(), exact, rtol=2**-23, atol=0)


def test_longer_rows_take_more_scales(instruction_set: str) -> None:
    """Parts of a long row are rounded alone, so an outlier harms its own part only."""
    torch.manual_seed(3)
    x, (weight, scale) = torch.randn(5, 3 * DEPTH), quantized(torch.randn(3 * DEPTH, 9), 1)
    x[:, 7] = 1000
    exact = x.double() @ weight.double()
    whole = relative_error(product(x, weight, scale), exact)
    assert relative_error(multiply(x, weight, scale), exact) < whole


def test_rows_without_size_and_without_bounds(instruction_set: str) -> None:
    torch.manual_seed(1)
    x, (weight, scale) = torch.randn(8, 50), quantized(torch.randn(50, 20), 1)
    x[1] = 0
    x[2, 7], x[3, 8], x[4, 49] = torch.nan, torch.inf, -torch.inf
    x[5], x[6] = x[5] * 1e-37, x[6] * 1e37
    found = multiply(x, weight, scale)
    assert found[2:5].isnan().all()
    assert not found[1].any() and found[5].abs().max() < 1e-34
    fine = [0, 6, 7]
    torch.testing.assert_close(found[fine].double(), product(x[fine], weight, scale), rtol=1e-5,
                               atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_read_back(dtype: torch.dtype, transposed: bool, instruction_set: str) -> None:
    torch.manual_seed(5)
    for shape in [(1, 1), (1, 64), (65, 1), (40, 17), (129, 100)]:
        grid, scale = quantized(torch.randn(shape), 0 if transposed else 1)
        weight = grid.to(dtype)
        data, form = packing.pack(weight, transposed, scale)
        # A weight of 16 bits lies beside its grid by a rounding; where it does, it is kept.
        assert form is not None or dtype != torch.float32
        if form is not None:
            assert torch.equal(form.read(data), weight)
        if dtype == torch.float32 and min(shape) >= 100:
            assert data.numel() < 0.3 * packing.pack(weight, transposed)[0].numel()


def test_scales_of_another_shape_are_refused() -> None:
    weight = torch.randn(8, 5)
    for scale in (torch.ones(8), torch.ones(5, dtype=torch.float64), torch.ones(1, 5),
                  torch.ones(10)[::2]):
        with pytest.raises(RuntimeError, match="float32 scale for each of the 5 outputs"):
            packing.pack(weight, False, scale)


OPERANDS = {"low_rank_mlp": (("v1", 1), ("u1", 0), ("v2", 1), ("u2", 0)),
            "dense_mlp": (("w1", 0), ("w2", 0)),
            "low_rank_attention": (("wq", 0), ("wk", 0), ("wv", 0), ("wo", 0)),
            "low_rank_linear": (("v", 1), ("u", 0))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp-197", "mlp-relu", "dense-hidden", "dense-thin",
                                  "attention-197", "attention-wide", "attention-causal",
                                  "linear-197", "linear-1100"])
def test_ops_take_weights_of_8_bits(name: str, dtype: torch.dtype, instruction_set: str) -> None:
    """Beside the formula with the weights on their grid, only rounding the rows costs digits."""
    case = ALL[name]
    names = [a.split(" ")[1] for a in OPS[case.op].arguments.split(", ")]
    given = convert(case.draw(), dtype)
    for weight, outputs in OPERANDS[case.op]:
        grid, scale = quantized(given[weight].float(), outputs)
        given[weight] = grid, scale
    arguments = [{**given, **case.options}.get(name) for name in names]
    packed = [packing.pack(a[0].to(dtype), dict(OPERANDS[case.op])[name] == 0, a[1])[0]
              if isinstance(a, tuple) else a for name, a in zip(names, arguments, strict=True)]
    kernel = backends.direct_kernel(case.op, next(a for a in arguments if isinstance(a, Tensor)))
    results = [kernel(*packed) for _ in range(2)]
    found = [r if isinstance(r, Tensor) else r[0] for r in results]
    assert torch.equal(*found)
    plain = {k: v[0] if isinstance(v, tuple) else v for k, v in given.items()}
    exact = case.plain(**convert(plain, torch.float64), **case.options)
    assert 0 < relative_error(found[0], exact) < 0.03
