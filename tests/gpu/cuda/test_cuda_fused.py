"""The CUDA kernels of fused ops as host C++: all types and tiles, ragged shapes, sanitizers."""

from dataclasses import replace

import cuda_calls
import cuda_host
import pytest
import torch
from cuda_cases import complaints, dense_complaints
from cuda_host import Host
from kernel_cases import UNITS, Case, worst
from kernel_shapes import ragged, vision
from ptx.mutations import ALL_MUTANTS
from test_cuda_low_rank_linear import TYPES

from adacomcat.ops import backends, reference

pytestmark = pytest.mark.skipif(cuda_host.missing() is not None, reason=str(cuda_host.missing()))
CASES = [case for case in ragged() if case.op in backends.CUDA_OPS and case.op != "low_rank_linear"]
# Many multiprocessors share out the hidden units among blocks of few rows, four do so among blocks
# of many rows, and for a single one a block takes the whole hidden layer.
MULTIPROCESSORS = (132, 4, 1)
SHOWN = [(case, dtype) for at, case in enumerate(CASES) for number, dtype in enumerate(TYPES)
         if ALL_MUTANTS or number == at // 2 % 3 and at % 2 == 0]


@pytest.mark.parametrize("case, dtype", SHOWN, ids=lambda v: getattr(v, "id", v))
def test_fused_ops(case: Case, dtype: str) -> None:
    """Numbers of multiprocessors take turns; with all mutants each case has all."""
    turn = CASES.index(case) % 3
    for count in MULTIPROCESSORS if ALL_MUTANTS else MULTIPROCESSORS[turn:turn + 1]:
        assert complaints(Host("quick", seed=1, multiprocessors=count), case, dtype) == []


@pytest.mark.parametrize("case", [case for case in vision("deit_s", 197)
                                  if case.sublayer and case.op in backends.CUDA_OPS],
                         ids=lambda case: case.id)
def test_a_vision_transformer(case: Case) -> None:
    """One image of DeiT-S."""
    assert complaints(Host("quick"), case, "bf16") == []


@pytest.mark.parametrize("dtype", TYPES)
def test_intermediates(dtype: str) -> None:
    """x V1 and h V2, by one launch and by two; q, k, v and the context."""
    kind = TYPES[dtype]
    m, d, r1, h, r2, n = 19, 24, 12, 200, 20, 40
    drawn = [torch.randn(m, d), torch.randn(d, r1) / d**0.5, torch.randn(h, r1) / r1**0.5,
             torch.randn(h), torch.randn(h, r2) / h**0.5, torch.randn(n, r2) / r2**0.5,
             torch.randn(n)]
    tensors = [t.to(kind) for t in drawn]
    exact, plain = (reference.low_rank_mlp(*(t.to(to) for t in tensors), "gelu")
                    for to in (torch.float64, kind))
    for count in (132, 1):
        found = cuda_calls.low_rank_mlp(Host("quick", multiprocessors=count), *tensors, "gelu",
                                        keep_intermediates=True)
        assert worst(*map(named, (found, exact, plain)), UNITS[dtype]) == []
    drawn = [torch.randn(2, 21, d), *(torch.randn(s) / 5 for s in ((16, d), (16,), (16, d), (24, d),
                                                                   (n, 24), (n,)))]
    tensors = [t.to(kind) for t in drawn]
    exact, plain = (reference.low_rank_attention(*(t.to(to) for t in tensors), 2, 0.4)
                    for to in (torch.float64, kind))
    found = cuda_calls.low_rank_attention(Host("quick"), *tensors, 2, 0.4)
    assert worst(*map(named, (found, exact, plain)), UNITS[dtype]) == []


def named(results: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return {str(i): t for i, t in enumerate(results)}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [132, 1])
@pytest.mark.parametrize("sizes", [(37, 40, 136, 72), (5, 33, 19, 7)], ids=str)
def test_dense_mlp(sizes: tuple[int, int, int, int], count: int, dtype: str) -> None:
    host = Host("quick", seed=1, multiprocessors=count)
    assert dense_complaints(host, sizes, TYPES[dtype], dtype, "gelu_tanh") == []


def test_numbers_that_are_infinite_stay_in_their_row() -> None:
    m, d, r1, h, r2, n = 18, 24, 12, 40, 20, 24
    x, *others = (torch.randn(s).half() / 3 for s in
                  ((m, d), (d, r1), (h, r1), (h,), (h, r2), (n, r2), (n,)))
    expected = cuda_calls.low_rank_mlp(Host("quick"), x, *others, "relu", epsilon=1e-6)[0]
    x[3, 2], x[7, 1] = torch.inf, torch.nan
    found = cuda_calls.low_rank_mlp(Host("quick"), x, *others, "relu", epsilon=1e-6)[0]
    rest = [i for i in range(m) if i not in (3, 7)]
    assert torch.equal(found[rest], expected[rest])
    assert not found[[3, 7]].isfinite().any()


def test_large_means_do_not_cancel() -> None:
    """The layer norm of rows whose mean is a thousand times their deviation, in float32."""
    x, v, u = torch.randn(9, 200) + 1000, torch.randn(200, 8), torch.randn(12, 8)

    def formula(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        x, v, u = tensors
        return {"y": torch.nn.functional.layer_norm(x, (200,), eps=1e-6) @ v @ u.mT}

    found = {"y": cuda_calls.low_rank_linear(Host("quick"), x, v, u, epsilon=1e-6)[0]}
    assert worst(found, formula(x.double(), v.double(), u.double()), formula(x, v, u)) == []


SANITIZED = [("low_rank_mlp-odd-sublayer", "fp16", 132), ("low_rank_mlp-odd-sublayer", "fp16", 1),
             ("low_rank_mlp-odd-sublayer", "fp32", 132),
             ("low_rank_attention-odd-sublayer", "fp16", 132),
             ("low_rank_attention-odd-sublayer", "fp32", 1),
             ("gated_low_rank_linear-odd", "fp16", 1)]


@pytest.mark.parametrize("name, dtype, count, mode", [
    (*one, mode) for at, one in enumerate(SANITIZED) for number, mode in enumerate(("asan", "tsan"))
    if ALL_MUTANTS or number == at % 2], ids=str)
def test_under_sanitizers(name: str, dtype: str, count: int, mode: str) -> None:
    case = next(case for case in CASES if case.id == name)
    if case.op == "low_rank_mlp":  # fewer rows: sanitizers are slow
        case = replace(case, sizes=case.sizes | {"lead": (19,)})
    assert complaints(Host(mode, seed=3, multiprocessors=count), case, dtype) == []
