"""What the CPU kernels approximate, activations and softmax, on every instruction set."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers.cpu_cases import ALL, each_dtype
from helpers.instruction_sets import lacking
from helpers.op_cases import DTYPES, attention_case, convert, plain_attention
from helpers.tolerance import assert_close_to_float64, relative_error
from torch import Tensor

from adacomcat import ops
from adacomcat.ops import reference

# Absolute error where the result is near zero; elsewhere a unit in the last place comes on top.
TAILS = {"gelu": 2.5e-4, "gelu_tanh": 1e-6, "silu": 1e-6, "relu": 0.0, "quick_gelu": 1e-6}


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Both zeros and every number of 16 bits up to 1e4, but denormals: bfloat16 units know none."""
    numbers = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    sizes = numbers.abs()
    normal = (sizes >= torch.finfo(dtype).tiny) & (sizes <= 1e4)  # NaN is neither
    return numbers[normal | (numbers == 0)]


def exact_activation(activation: str, x: Tensor) -> Tensor:
    if activation == "quick_gelu":
        return F.silu(1.702 * x) / 1.702
    options = {"approximate": "tanh"} if activation == "gelu_tanh" else {}
    return getattr(F, activation.removesuffix("_tanh"))(x, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", TAILS)
def test_activations_of_all_numbers_of_16_bits(activation: str, dtype: torch.dtype,
                                               instruction_set: str) -> None:
    x = all_numbers(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    y = ops.low_rank_linear(x.unsqueeze(1), one, one, activation=activation).squeeze(1)
    exact = exact_activation(activation, x.double())
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps,
                               atol=TAILS[activation])
    assert (y[x == 0] == 0).all()


@pytest.mark.parametrize("activation", TAILS)
def test_slopes_of_all_numbers_of_16_bits(activation: str, instruction_set: str) -> None:
    x = all_numbers(torch.bfloat16).unsqueeze(1)
    x = x[x != 0].unsqueeze(1).requires_grad_()  # where ReLU has one
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    slope, = torch.autograd.grad(
        ops.low_rank_linear(x, one, one, activation=activation).sum(), x)
    exact = x.detach().double().requires_grad_()
    expected, = torch.autograd.grad(exact_activation(activation, exact).sum(), exact)
    torch.testing.assert_close(slope.double(), expected, rtol=torch.finfo(torch.bfloat16).eps,
                               atol=1e-5)


@each_dtype
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_softmax_of_any_size(scale: float, dtype: torch.dtype, instruction_set: str,
                             poisoned_memory: None) -> None:
    """Up to logits that leave nothing of all keys but one."""
    case = attention_case(1, 75, 48, 2, 70, 33)
    base = convert(case.draw(), dtype)
    call = {**case.options, "scale": scale}
    exact = plain_attention(**convert(base, torch.float64), **call)
    actual = ops.low_rank_attention(**base, **call)
    # The last place of bfloat16 logits of hundreds decides, so PyTorch's own error is the measure.
    assert_close_to_float64(actual, exact, plain_attention(**base, **call))


@each_dtype
@pytest.mark.parametrize("size", [-1e4, -1e9, -1e10, -1e12, -1e20, 1e10, 1e30, "lowest"])
def test_masks_of_any_size(size: float | str, dtype: torch.dtype, instruction_set: str,
                           poisoned_memory: None) -> None:
    """Everywhere in a row, where only the differences of logits count, and above the diagonal."""
    case = attention_case(2, 37, 16, 2, 3, 4)
    base = convert(case.draw(), dtype)
    info = torch.finfo(dtype)
    size = info.min if size == "lowest" else min(max(size, info.min), info.max)
    causal = torch.full((37, 37), size, dtype=dtype).triu(1)
    padded = causal.index_fill(0, torch.tensor(3), size)
    for mask in (torch.full_like(causal, size), causal, padded):
        tensors = base | {"attn_mask": mask}
        exact, plain = (reference.low_rank_attention(**given, **case.options)[0]
                        for given in (convert(tensors, torch.float64), tensors))
        assert_close_to_float64(case.call(tensors), exact, plain)


def test_equal_logits_of_any_size_have_equal_weights(instruction_set: str) -> None:
    case = attention_case(1, 37, 16, 2, 3, 4, bias=False)
    tensors = convert(case.draw(), torch.float32)
    tensors["attn_mask"] = torch.full((37, 37), torch.finfo(torch.float32).min)
    mean = (tensors["x"] @ tensors["wv"].t()).mean(1, keepdim=True) @ tensors["wo"].t()
    torch.testing.assert_close(case.call(tensors), mean.expand(1, 37, 16))


def test_logits_of_any_size(instruction_set: str) -> None:
    """Of 1e18, all but the largest of a row have no weight."""
    case = attention_case(1, 37, 16, 2, 3, 4)
    base = convert(case.draw(), torch.float32)
    for name in ("x", "wq", "wk", "bq"):
        base[name] *= 3e4
    exact, plain = (plain_attention(**convert(base, dtype), **case.options)
                    for dtype in (torch.float64, torch.float32))
    assert_close_to_float64(case.call(base), exact, plain)


@each_dtype
def test_masked_tokens_do_not_count_at_all(dtype: torch.dtype, instruction_set: str) -> None:
    case = attention_case(1, 37, 16, 2, 3, 4)
    tensors = convert(case.draw(), dtype)
    tensors["attn_mask"] = torch.ones(37, 37, dtype=torch.bool)
    tensors["attn_mask"][:20, 20:] = False
    before = case.call(tensors)
    tensors["x"][0, 20:] *= 1e4 if dtype == torch.float16 else 1e30
    after = case.call(tensors)
    assert torch.equal(after[0, :20], before[0, :20])


def test_tile_registers_are_left_to_others(instruction_set: str) -> None:
    """PyTorch multiplies on the same ones, and in between."""
    a, b = (torch.randn(256, 256).bfloat16() for _ in range(2))
    expected = a @ b
    for name in ("linear-197", "attention-197", "mlp-197"):
        for dtype in DTYPES:
            tensors = convert(ALL[name].draw(), dtype)
            first = ALL[name].call(tensors)
            assert torch.equal(a @ b, expected)
            assert torch.equal(ALL[name].call(tensors), first)


@pytest.mark.parametrize(("row", "column"), [(70, 20), (20, 70)])
@each_dtype
def test_powers_of_two_pass_through(row: int, column: int, dtype: torch.dtype,
                                    instruction_set: str) -> None:
    """Rows and columns of any size, those whose squares are no floats as well."""
    x, v, u = torch.randn(37, 70), torch.randn(70, 33), torch.randn(50, 33)
    expected = ops.low_rank_linear(x.to(dtype), v.to(dtype), u.to(dtype))
    if dtype == torch.float16:
        row, column = row // 20, column // 20
    rows, columns = (2.0 ** torch.randint(-most, most + 1, (n, 1))
                     for n, most in ((37, row), (50, column)))
    actual = ops.low_rank_linear((x * rows).to(dtype), v.to(dtype), (u * columns).to(dtype))
    assert torch.equal(actual.double() / columns.T / rows, expected.double())


@pytest.mark.parametrize("width", [32, 1000, 4096])
@each_dtype
def test_sums_of_one_sign_stay_in_range(width: int, dtype: torch.dtype,
                                        instruction_set: str) -> None:
    """Rows that equal a weight's column give the largest sum that their norms allow."""
    rows = torch.cat([torch.ones(1, width), torch.eye(1, width), torch.rand(3, width)]).to(dtype)
    weight = torch.eye(5).to(dtype)
    y = ops.low_rank_linear(rows, rows.T.contiguous(), weight)
    exact = rows.double() @ rows.double().T
    limit = max(torch.finfo(dtype).eps, 1e-6)  # thousands of floats, one after the other
    assert ((y.double() - exact).abs() <= limit * exact.norm(dim=1, keepdim=True)).all()


@each_dtype
def test_one_large_feature(dtype: torch.dtype, instruction_set: str) -> None:
    """As trained transformers have it: hundreds of times the others."""
    base = {"x": torch.randn(40, 384), "v": torch.randn(384, 32) / 20, "u": torch.randn(96, 32) / 6}
    base["x"][:, 17] *= 200
    base = convert(base, dtype)
    exact, plain = (b["x"] @ b["v"] @ b["u"].T for b in (convert(base, torch.float64), base))
    assert_close_to_float64(ops.low_rank_linear(**base), exact, plain)


def test_infinity_stays_in_its_row(instruction_set: str) -> None:
    x, v, u = (torch.randn(*shape).bfloat16() for shape in ((30, 64), (64, 16), (40, 16)))
    expected = ops.low_rank_linear(x, v, u)
    x[7, 3] = torch.inf
    actual = ops.low_rank_linear(x, v, u)
    others = torch.arange(30) != 7
    assert torch.equal(actual[others], expected[others])
    assert not actual[7].isfinite().any()


@pytest.fixture
def reduced_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def tensor_float32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, as double."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1fff).view(torch.float32).double()


@pytest.mark.parametrize("width", [33, 384, 1100])
def test_reduced_float32_is_as_good_as_tensor_float32(width: int, instruction_set: str,
                                                      reduced_precision: None) -> None:
    x, v, u = torch.randn(50, width), torch.randn(width, 40), torch.randn(70, 40)
    actual = ops.low_rank_linear(x, v, u).double()
    exact = x.double() @ v.double() @ u.double().T
    rounded = tensor_float32(tensor_float32(x) @ tensor_float32(v)) @ tensor_float32(u).T
    assert relative_error(actual, exact) <= 2 * relative_error(rounded, exact)


@pytest.mark.parametrize("activation", TAILS)
def test_reduced_float32_leaves_activations_alone(activation: str, instruction_set: str,
                                                  reduced_precision: None) -> None:
    x, one = torch.linspace(-9, 9, 4001).unsqueeze(1), torch.ones(1, 1)
    y = ops.low_rank_linear(x, one, one, activation=activation)
    torch.testing.assert_close(y.double(), exact_activation(activation, x.double()), rtol=1e-5,
                               atol=2e-6)


def test_precision_is_asked_at_each_call(instruction_set: str,
                                         reduced_precision: None) -> None:
    """Only integers of VNNI are worth less precision, and AMX needs none."""
    x, v, u = torch.randn(50, 300), torch.randn(300, 40), torch.randn(70, 40)
    reduced = ops.low_rank_linear(x, v, u)
    torch.set_float32_matmul_precision("highest")
    full = ops.low_rank_linear(x, v, u)
    integers = not lacking("avx512_vnni") and instruction_set in ("avx512_vnni", "avx512_bf16")
    assert torch.equal(reduced, full) != integers
