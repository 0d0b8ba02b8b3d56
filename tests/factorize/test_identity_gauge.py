"""Identities in an MLP's factors: the same function, and what the kernel must find in them."""

import copy

import pytest
import timm
import torch
from helpers.op_cases import DTYPES, convert, mlp_case
from helpers.tolerance import assert_close_to_float64
from torch import Tensor

from adacomcat import ops
from adacomcat.compression import compress
from adacomcat.factorize.gauge import MlpFactors, identity_gauge
from adacomcat.fuse import optimize
from adacomcat.layers.fused import FusedMlp
from adacomcat.ops import reference


def draw(inputs: int, rank1: int, hidden: int, rank2: int, outputs: int) -> MlpFactors:
    shapes = (inputs, rank1), (hidden, rank1), (hidden,), (hidden, rank2), (outputs, rank2)
    return MlpFactors(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))


def apply(x: Tensor, f: MlpFactors) -> Tensor:
    return reference.low_rank_mlp(x, *f, None, "gelu")[0]


def identity_sizes(f: MlpFactors) -> tuple[int, int]:
    """(|P|, |Q|): the last rows of u1 and the first of v2 that are the identity's."""
    def leading(rows: Tensor) -> int:
        equal = (rows == torch.eye(*rows.shape, dtype=rows.dtype)).all(1).long()
        return int(equal.cumprod(0).sum())

    last = (n for n in range(f.u1.shape[1] + 1) if leading(f.u1[len(f.u1) - n:]) == n)
    return max(last), leading(f.v2)


@pytest.mark.parametrize("sizes, expected", [
    ((48, 44, 200, 90, 31), (32, 64)),
    ((130, 128, 512, 96, 130), (96, 64)),
    ((20, 31, 90, 42, 20), (0, 0)),  # 3/4 of neither is 32
    ((70, 64, 90, 64, 70), (32, 0)),  # too few neurons are left for the other
    ((64, 64, 50, 64, 64), (0, 0)),  # wider than the hidden layer
])
def test_the_same_function(sizes: tuple, expected: tuple) -> None:
    before = draw(*sizes)
    after = identity_gauge(before)
    x = torch.randn(33, sizes[0], dtype=torch.float64)
    torch.testing.assert_close(apply(x, after), apply(x, before), rtol=1e-10, atol=1e-9)
    assert identity_sizes(after) == expected


def test_numbers_that_are_none_stay_where_they_are() -> None:
    before = draw(48, 44, 200, 44, 48)
    before.u1[7, 7], before.v2[8, 8] = float("nan"), float("inf")
    for a, b in zip(identity_gauge(before), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_where_no_other_neurons_serve() -> None:
    """All that V2 reads are neurons that U1 has taken."""
    before = draw(48, 44, 200, 44, 48)
    before.u1[44:], before.v2[44:] = 0, 0
    after = identity_gauge(before)
    x = torch.randn(33, 48, dtype=torch.float64)
    torch.testing.assert_close(apply(x, after), apply(x, before), rtol=1e-10, atol=1e-9)
    assert identity_sizes(after) == (32, 0)


def identity_case(rank1: int, hidden: int, rank2: int, size1: int, size2: int):
    """An MLP whose u1 ends with, and whose v2 begins with, rows of the identity."""
    case = mlp_case((2, 150), 48, rank1, hidden, rank2, "gelu")
    tensors = case.draw()
    tensors["u1"][hidden - size1:] = torch.eye(rank1)[:size1]
    tensors["v2"][:size2] = torch.eye(rank2)[:size2]
    return case, tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [
    (40, 320, 70, 32, 64), (40, 320, 70, 32, 0), (40, 300, 70, 32, 64), (33, 97, 40, 0, 32),
    (64, 704, 33, 64, 32), (64, 64, 64, 64, 64), (64, 64, 20, 64, 0), (20, 32, 32, 0, 32),
    (100, 160, 64, 96, 32), (96, 100, 40, 90, 20),
], ids=str)
def test_kernel(sizes: tuple, dtype: torch.dtype, instruction_set: str,
                threads: None, poisoned_memory: None) -> None:
    case, tensors = identity_case(*sizes)
    base = convert(tensors, dtype)
    exact = case.plain(**convert(base, torch.float64), **case.options)
    plain = case.plain(**base, **case.options)
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        assert_close_to_float64(case.call(base), exact, plain)


def test_kernel_sees_that_an_identity_is_gone(instruction_set: str) -> None:
    case, tensors = identity_case(40, 300, 70, 32, 64)
    base = convert(tensors, torch.float32)
    case.call(base)
    base["u1"][-1, 0] += 0.5
    base["v2"][63, 1] -= 0.5
    exact = case.plain(**convert(base, torch.float64), **case.options)
    assert_close_to_float64(case.call(base), exact, case.plain(**base, **case.options))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimize_takes_it_in_float32(dtype: torch.dtype) -> None:
    """Numbers of fewer digits would be rounded once more."""
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10).eval()
    low = compress(model, keep_params=0.7).to(dtype)
    fused = optimize(low)
    factors = [MlpFactors(*(getattr(m, name) for name in MlpFactors._fields))
               for m in fused.modules() if type(m) is FusedMlp]
    assert [identity_sizes(f) for f in factors] == [
        tuple(w.shape[1] * 3 // 4 // 32 * 32 * (dtype == torch.float32) for w in (f.u1, f.v2))
        for f in factors]
    assert any(f.u1.shape[1] > 42 for f in factors)
    x = torch.randn(3, 3, 224, 224, dtype=dtype)
    exact = copy.deepcopy(low).double()(x.double())
    assert_close_to_float64(fused(x), exact, low(x))


def test_gradients_pass_through(instruction_set: str) -> None:
    case, tensors = identity_case(40, 300, 70, 32, 64)
    base = convert(tensors, torch.float32, grad=True)
    plain = convert(tensors, torch.float32, grad=True)
    getattr(ops, case.op)(**base, **case.options).square().sum().backward()
    case.plain(**plain, **case.options).square().sum().backward()
    for name in ("x", "v1", "u1", "v2", "u2"):
        torch.testing.assert_close(base[name].grad, plain[name].grad, rtol=1e-3, atol=1e-3)
