"""Weights of the C++ kernels: as they are at each call, or packed once and read back exactly."""

import gc
import threading

import pytest
import torch
from helpers.cpu_cases import ALL
from helpers.instruction_sets import NAMES, here, lacking, use
from helpers.op_cases import convert

from adacomcat import ops
from adacomcat.ops import backends, packing
from adacomcat.ops.registry import OPS

needs_kernels = pytest.mark.skipif(not backends.build_info(), reason="no C++ extension")


def products(v: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.eye(v.shape[0])
    return ops.low_rank_linear(x, v, u), v @ u.t()


CHANGES = {
    "add_": lambda p: p.add_(1),
    "data.mul_": lambda p: p.data.mul_(2),
    "copy_": lambda p: p.copy_(torch.randn_like(p)),
    "data=": lambda p: setattr(p, "data", torch.randn_like(p)),
    "strides": lambda p: p.t_().t_().neg_(),
    "one element of data": lambda p: p.data.__setitem__((11, 3), 9.0),
    "one row of data": lambda p: p.data[7].zero_(),
    "numpy": lambda p: p.detach().numpy().__setitem__((slice(None), 5), 3.0),
    "DLPack": lambda p: torch.from_dlpack(p.detach()).__setitem__((2, slice(None)), -1.0),
    "another thread": lambda p: in_a_thread(lambda: p.data[3].fill_(4)),
}


def in_a_thread(work: object) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_every_change_of_a_weight_is_seen(change: object) -> None:
    v, u = torch.nn.Parameter(torch.randn(40, 9)), torch.nn.Parameter(torch.randn(30, 9))
    torch.testing.assert_close(*products(v, u))
    for parameter in (v, u):
        change(parameter)
        torch.testing.assert_close(*products(v, u))


def test_weights_follow_an_optimizer() -> None:
    v, u = torch.nn.Parameter(torch.randn(40, 9)), torch.nn.Parameter(torch.randn(30, 9))
    optimizer = torch.optim.AdamW([v, u], lr=0.1)
    for _ in range(3):
        ops.low_rank_linear(torch.eye(40), v, u).square().sum().backward()
        optimizer.step()
        with torch.inference_mode():
            torch.testing.assert_close(*products(v, u))


def test_threads_share_a_weight() -> None:
    case = ALL["mlp-197"]
    tensors = convert(case.draw(), torch.float32)
    expected, results = case.call(tensors), [None] * 4

    def run(i: int) -> None:
        results[i] = [case.call(tensors) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected) for result in results for y in result)


SHAPES = [(1, 1), (1, 64), (65, 1), (32, 32), (40, 17), (97, 33), (129, 100), (384, 130)]


@needs_kernels
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_packed_weights_are_read_back_exactly(
    name: str, dtype: torch.dtype, transposed: bool
) -> None:
    if lacking(name):
        pytest.skip(f"this CPU has no {name}")
    torch.manual_seed(len(name))
    before = here()
    use(name)
    try:
        for shape in SHAPES:
            weight = torch.randn(shape).mul(torch.randn(shape).exp()).to(dtype)
            data, form = packing.pack(weight, transposed)
            if form is None:
                assert name == "avx512_vnni" and dtype == torch.bfloat16  # it multiplies integers
            else:
                assert torch.equal(form.read(data), weight)
    finally:
        use(before)


@needs_kernels
@pytest.mark.parametrize("bits", [torch.nan, torch.inf, 1e-42])
def test_a_weight_that_packing_might_change_is_kept(bits: float) -> None:
    weight = torch.randn(40, 33)
    weight[3, 4] = bits
    data, form = packing.pack(weight, True)
    if form is not None:
        assert torch.equal(form.read(data), weight)
    assert packing.pack(weight.double(), True) is None
    assert packing.pack(weight[:0], True) is None


PACKED = {"low_rank_mlp": (("v1", False), ("u1", True), ("v2", False), ("u2", True)),
          "dense_mlp": (("w1", True), ("w2", True)),
          "low_rank_attention": (("wq", True), ("wk", True), ("wv", True), ("wo", True)),
          "low_rank_linear": (("v", False), ("u", True))}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp-197", "dense-197", "attention-197", "linear-197"])
def test_ops_take_packed_weights(name: str, dtype: torch.dtype) -> None:
    """The same bits, whichever way the weights come."""
    case = ALL[name]
    names = [a.split(" ")[1] for a in OPS[case.op].arguments.split(", ")]
    given = {**convert(case.draw(), dtype), **case.options}
    arguments = [given.get(name) for name in names]
    kernel = backends.direct_kernel(case.op, arguments[0])
    packed = list(arguments)
    for weight, transposed in PACKED[case.op]:
        place = names.index(weight)
        packed[place] = packing.pack(arguments[place], transposed)[0]

    def first(result: object) -> torch.Tensor:
        return result if isinstance(result, torch.Tensor) else result[0]

    expected = first(kernel(*arguments))
    for _ in range(3):
        assert torch.equal(first(kernel(*packed)), expected)
    with pytest.raises(RuntimeError):
        kernel(*[p[:-1] if p is not a else a for p, a in zip(packed, arguments, strict=True)])


@needs_kernels
def test_bytes_that_are_no_packed_weight_are_refused() -> None:
    x, u = torch.randn(8, 24), torch.randn(30, 9)
    kernel = backends.direct_kernel("low_rank_linear", x)
    good = packing.pack(torch.randn(24, 9), False)[0]
    other = packing.pack(torch.randn(23, 9), False)[0]
    for bad in (torch.zeros(0, dtype=torch.uint8), torch.zeros(500, dtype=torch.uint8), other,
                good.repeat(2), good[:70]):
        with pytest.raises(RuntimeError):
            kernel(x, bad, packing.pack(u, True)[0], None, None, None)


@needs_kernels
def test_what_followed_may_be_gone() -> None:
    """Kernels fetch the weights that came next the last time: here of a layer since deleted."""
    x = torch.randn(300, 64)
    kernel = backends.direct_kernel("dense_mlp", x)

    def weights() -> list[torch.Tensor]:
        return [packing.pack(torch.randn(64, 64), True)[0] for _ in range(2)]

    w1, w2 = weights()
    expected = kernel(x, w1, None, w2, None, "gelu")
    kernel(x, *(t for w in weights() for t in (w, None)), "gelu")
    gc.collect()
    for _ in range(3):
        assert torch.equal(kernel(x, w1, None, w2, None, "gelu"), expected)
