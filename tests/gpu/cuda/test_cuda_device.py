"""The CUDA C++ ops on a real GPU, through `use_backend("cuda")`, against float64."""

from typing import Any

import pytest
import torch
from helpers.matrices import check
from kernel_cases import DTYPES, EPSILON, UNITS, Case, draw, incoming, oracles, worst
from kernel_shapes import ragged_and_vision
from torch import Tensor

from adacomcat import ops
from adacomcat.ops import backends, decompositions, reference, registry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
CASES = [case for case in ragged_and_vision() if case.op in backends.CUDA_OPS]


def needs_cuda() -> None:
    if backends.available()["cuda"] is not None:
        pytest.skip(str(backends.available()["cuda"]))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_fused_ops_in_cuda(case: Case, dtype: str) -> None:
    needs_cuda()
    arguments = draw(case, DTYPES[dtype][0])
    grad = incoming(case, arguments)
    exact, plain = oracles(case, dtype, arguments, grad)
    moved: list[Any] = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    whole = {"epsilon": EPSILON, "residual": grad.cuda()} if case.sublayer else {}
    with torch.no_grad(), backends.use_backend("cuda"):
        out = registry.OPS[case.op](*moved, **whole).cpu()
    assert worst({"out": out}, {"out": exact["out"]}, {"out": plain["out"]}, UNITS[dtype]) == []


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("rows", [5, 197, 4000])
def test_dense_mlp_in_cuda(rows: int, dtype: str) -> None:
    needs_cuda()
    kind = DTYPES[dtype][0]
    drawn = [torch.randn(rows, 96), torch.randn(384, 96) / 96**0.5, torch.randn(384),
             torch.randn(72, 384) / 384**0.5, torch.randn(72)]
    tensors = [t.to(kind) for t in drawn]
    exact, plain = (reference.dense_mlp(*(t.to(to) for t in tensors), "gelu")
                    for to in (torch.float64, kind))
    with torch.no_grad(), backends.use_backend("cuda"):
        out = ops.dense_mlp(*(t.cuda() for t in tensors), "gelu").cpu()
    assert worst({"out": out}, {"out": exact}, {"out": plain}, UNITS[dtype]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7, 9, 12), (3, 32, 32), (5, 40, 33), (2, 96, 96), (2, 100, 7)],
                         ids=str)
def test_decompositions_in_cuda(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    needs_cuda()
    a = torch.randn(shape, dtype=dtype)
    with backends.use_backend("cuda"):
        u, s, v = decompositions.batched_svd(a.cuda())
        errors = decompositions.truncation_errors(s)
        a[1, 2, 1] = torch.nan
        with pytest.raises(ValueError, match="matrix 1 of .*NaN or infinite"):
            decompositions.batched_svd(a.cuda())
    a[1, 2, 1] = 0
    check(a[:1], u.cpu()[:1], s.cpu()[:1], v.cpu()[:1])
    expected = reference.truncation_errors(s.cpu().double()).to(dtype)
    torch.testing.assert_close(errors.cpu(), expected)
