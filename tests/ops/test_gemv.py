"""Few rows: threads share out columns of the weights, and single rows meet weights as they lie."""

import pytest
import torch
import torch.nn.functional as F
from helpers.cpu_cases import ALL, check_norm_and_residual, each_dtype
from helpers.op_cases import Case, convert, dense_case, mlp_case, strided
from helpers.tolerance import assert_close_to_float64

from adacomcat.ops import backends, inference

SINGLE = {
    "mlp-1": mlp_case((1,), 64, 24, 300, 40, "gelu"),
    "mlp-2": mlp_case((2, 1), 33, 15, 129, 65, "silu"),
    "mlp-4": mlp_case((4,), 130, 200, 1536, 130, "relu"),
    "mlp-rank0": mlp_case((3,), 16, 0, 20, 5, "gelu_tanh"),
    "mlp-identity": mlp_case((1, 2), 9, 3, 7, 1, None),
    "dense-1": dense_case((1,), 96, 1536, 96, "gelu"),
    "dense-3": dense_case((3,), 47, 1027, 65, "gelu_tanh"),
    "dense-no-bias": dense_case((1, 4), 33, 256, 16, "relu", bias=False),
    "dense-hidden1": dense_case((2,), 31, 1, 3, "silu"),
}


@each_dtype
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["mlp-197", "mlp-hidden", "mlp-relu", "mlp-rank0", "dense-197",
                                  "dense-hidden", "dense-256", "attention-197", "attention-wide",
                                  "attention-causal"])
def test_columns_shared_by_threads(name: str, count: int, dtype: torch.dtype,
                                     instruction_set: str, threads: None,
                                     poisoned_memory: None) -> None:
    """Which share out columns of the weights, in which every one of these has panels enough."""
    case = ALL[name]
    base = convert(case.draw(), dtype)
    exact = case.plain(**convert(base, torch.float64), **case.options)
    plain = case.plain(**base, **case.options)
    torch.set_num_threads(count)
    assert_close_to_float64(case.call(base), exact, plain)
    kernel = getattr(torch.ops.adacomcat, f"{case.op}_cpu")
    kept = []
    if "dense" not in name:
        _, *kept = kernel(**base, **case.options, keep_intermediates=True)
    expected = getattr(backends.reference, case.op)(**base, **case.options)
    for found, middle in zip(kept, expected[1:], strict=False):
        torch.testing.assert_close(found, middle, rtol=0.05, atol=0.05)


@each_dtype
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", SINGLE.values(), ids=SINGLE.keys())
def test_single_rows(case: Case, count: int, dtype: torch.dtype, instruction_set: str,
                     threads: None, poisoned_memory: None) -> None:
    torch.set_num_threads(count)
    base = convert(case.draw(), dtype)
    exact = case.plain(**convert(base, torch.float64), **case.options)
    actual = case.call(base)
    assert_close_to_float64(actual, exact, case.plain(**base, **case.options))
    for layout in (strided, transposed):
        other = case.call({name: layout(t) for name, t in base.items()})
        torch.testing.assert_close(other, actual)


@each_dtype
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 384, 1000), (4, 33, 70), (3, 1, 1), (2, 130, 5), (0, 8, 3),
                                   (2, 8, 0), (5, 64, 40), (2, 0, 3), (6, 0, 3)], ids=str)
def test_gemv(shape: tuple[int, int, int], bias: bool, count: int,
                                  dtype: torch.dtype, instruction_set: str,
                                  threads: None, poisoned_memory: None) -> None:
    """Five rows are PyTorch's."""
    torch.set_num_threads(count)
    rows, width, out = shape
    x, weight = ((torch.randn(n, width) / max(width, 1)**0.5).to(dtype) for n in (rows, out))
    b = torch.randn(out).to(dtype) if bias else None
    exact = F.linear(x.double(), weight.double(), b if b is None else b.double())
    actual = inference.linear(x, weight, b)
    assert actual.shape == (rows, out) and actual.dtype == dtype
    if actual.numel():
        assert_close_to_float64(actual, exact, F.linear(x, weight, b))
    for layout in (strided, transposed):
        other = inference.linear(layout(x), layout(weight), b)
        torch.testing.assert_close(other, actual)


def test_gemv_elsewhere() -> None:
    """With a gradient, under autocast and of float64 it is PyTorch's."""
    x, weight, bias = torch.randn(2, 8), torch.randn(3, 8, requires_grad=True), torch.randn(3)
    assert inference.linear(x, weight, bias).requires_grad
    weight = weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert inference.linear(x, weight, bias).dtype == torch.bfloat16
    double = [t.double() for t in (x, weight, bias)]
    assert torch.equal(inference.linear(*double), F.linear(*double))
    with pytest.raises(RuntimeError, match="weight must have shape"):
        inference.linear(x, weight[:, :5], bias)


def transposed(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A matrix whose columns are contiguous."""
    return tensor if tensor is None or tensor.ndim != 2 else tensor.mT.contiguous().mT


@each_dtype
@pytest.mark.parametrize("name", ["mlp-4", "dense-1", "dense-3"])
def test_single_rows_with_norm_and_residual(name: str, dtype: torch.dtype,
                                            instruction_set: str,
                                            poisoned_memory: None) -> None:
    check_norm_and_residual(SINGLE[name], dtype)


@pytest.mark.parametrize("name", ["mlp-1", "dense-1"])
def test_single_rows_read_the_weights_themselves(name: str) -> None:
    """What is packed notices changes through ``.data`` by a sample; here each one counts."""
    case = SINGLE[name]
    tensors = convert(case.draw(), torch.float32)
    weight = next(t for key, t in tensors.items() if key in ("u2", "w2"))
    with backends.use_backend("cpp"):
        for row in range(len(weight)):
            before = case.call(tensors)
            weight.data[row] += 1
            assert not torch.equal(case.call(tensors)[..., row], before[..., row])
