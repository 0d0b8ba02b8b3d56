"""Every op against a float64 oracle: values, gradients, dtypes, layouts, compilation, errors."""

import pytest
import torch
import torch._dynamo.testing
from helpers.op_cases import (
    CASES,
    DTYPES,
    SMALLEST,
    Case,
    attention_case,
    convert,
    each_case,
    leaves,
    small_case,
    smallest_case,
    strided,
    value_and_gradients,
)
from helpers.tolerance import assert_close_to_float64
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adacomcat import ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_values_and_gradients(case: Case, dtype: torch.dtype, poisoned_memory: None) -> None:
    base = convert(case.draw(), dtype)
    double = convert(base, torch.float64, grad=True)
    grad_out = torch.randn_like(case.plain(**double, **case.options))
    exact = value_and_gradients(case.plain, double, grad_out, **case.options)
    options = case.options
    plain = value_and_gradients(case.plain, convert(base, dtype, grad=True), grad_out, **options)
    op = getattr(ops, case.op)
    actual = value_and_gradients(op, convert(base, dtype, grad=True), grad_out, **options)
    # Rounding decides on which side of relu's kink a value of half precision falls.
    kink = case.options.get("activation") == "relu" and dtype != torch.float32
    for name in ["out"] if kink else exact:
        assert_close_to_float64(actual[name], exact[name], plain[name], name)
    with torch.no_grad():
        again = case.call(base)
    assert torch.equal(again, actual["out"]) and not again.requires_grad


@smallest_case
def test_gradcheck_twice(case: Case) -> None:
    tensors = convert(case.draw(), torch.float64, grad=True)
    names = list(leaves(tensors))

    def f(*values: Tensor) -> Tensor:
        return case.call({**tensors, **dict(zip(names, values, strict=True))})

    values = [tensors[n] for n in names]
    assert torch.autograd.gradcheck(f, values)
    assert torch.autograd.gradgradcheck(f, values)


@smallest_case
def test_each_gradient_alone_is_the_same(case: Case) -> None:
    tensors = convert(case.draw(), torch.float64, grad=True)
    grad_out = torch.randn_like(case.call(tensors))
    together = value_and_gradients(getattr(ops, case.op), tensors, grad_out, **case.options)
    for name in leaves(tensors):
        alone = {
            n: t if t is None else t.detach().requires_grad_(n == name) for n, t in tensors.items()
        }
        result = value_and_gradients(getattr(ops, case.op), alone, grad_out, **case.options)
        assert set(result) == {"out", name}
        torch.testing.assert_close(result[name], together[name])


@small_case
def test_layout_in_memory_does_not_matter(case: Case) -> None:
    tensors = convert(case.draw(), torch.float64)
    views = {n: strided(t) for n, t in tensors.items()}
    assert not views["x"].is_contiguous()
    actual = case.call(views)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, case.call(tensors))
    transposed = {**tensors, "x": tensors["x"].mT.contiguous().mT}
    torch.testing.assert_close(case.call(transposed), case.call(tensors))


@pytest.mark.parametrize("keep", [True, False])
@smallest_case
def test_opcheck(case: Case, keep: bool) -> None:
    op = getattr(torch.ops.adacomcat, case.op).default
    tensors = convert(case.draw(), torch.float32, grad=True)
    arguments = {**tensors, **case.options}
    order = [a.name for a in op._schema.arguments[:-1]]
    torch.library.opcheck(op, (*(arguments[n] for n in order), keep))


def test_compile_whole_graph_forward_and_backward() -> None:
    cases = [SMALLEST[n] for n in ("linear", "gated", "mlp", "dense", "attention")]
    draws = [convert(c.draw(), torch.float32, grad=True) for c in cases]

    def f(draws: list[dict]) -> Tensor:
        outs = [c.call(d) for c, d in zip(cases, draws, strict=True)]
        return sum((o * o.detach().cos()).sum() for o in outs)

    wanted = [t for d in draws for t in leaves(d).values()]
    eager = f(draws)
    # What inductor makes of the rest of a model is tested elsewhere.
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(draws)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled, wanted), torch.autograd.grad(eager, wanted), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_compile_without_recompilation_for_other_batches() -> None:
    case = CASES["attention-wide-qk"]
    tensors = convert(case.draw(), torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.call, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch in (5, 3, 7):  # none equals num_heads, or PyTorch would take them for one symbol
        tensors["x"] = torch.randn(batch, *tensors["x"].shape[1:])
        torch.testing.assert_close(compiled(tensors), case.call(tensors))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1 and compilations[0] > 0


@pytest.mark.parametrize("compiled", [False, True])
@small_case
def test_autocast(case: Case, compiled: bool) -> None:
    tensors = convert(case.draw(), torch.float32, grad=True)
    call = torch.compile(case.call, fullgraph=True, backend="aot_eager") if compiled else case.call
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(tensors)
    assert out.dtype == torch.bfloat16
    cast = convert(tensors, torch.bfloat16)
    torch.testing.assert_close(out, case.call(cast))
    grads = torch.autograd.grad(out.float().square().sum(), list(leaves(tensors).values()))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_autocast_leaves_float64() -> None:
    case = CASES["linear-odd"]
    tensors = case.draw(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.call(tensors), case.call(tensors))
        assert case.call(tensors).dtype == torch.float64


@pytest.mark.parametrize("name", ["linear-odd", "gated", "mlp", "dense", "attention"])
def test_flops_are_those_of_the_matrix_products(name: str) -> None:
    case = CASES[name]
    tensors = convert(case.draw(), torch.float32)
    with FlopCounterMode(display=False) as plain:
        case.plain(**tensors, **case.options)
    with FlopCounterMode(display=False) as actual:
        case.call(tensors)
    assert actual.get_total_flops() == plain.get_total_flops() > 0


def test_rows_masked_entirely_give_the_bias_and_no_gradient() -> None:
    case = attention_case(1, 6, 8, 2, 3, 4, "bool", (6, 6))
    tensors = convert(case.draw(), torch.float64, grad=True)
    tensors["attn_mask"][2] = False
    out = case.call(tensors)
    torch.testing.assert_close(out[0, 2], tensors["bo"])
    grads = torch.autograd.grad(out[0, 2].sum(), list(leaves(tensors).values()))
    for name, grad in zip(leaves(tensors), grads, strict=True):
        assert torch.equal(grad, torch.ones_like(grad) if name == "bo" else torch.zeros_like(grad))
    additive = {**tensors, "attn_mask": torch.zeros(6, 6).double().masked_fill(
        ~tensors["attn_mask"], float("-inf"))}
    grads = torch.autograd.grad(case.call(additive).sum(), list(leaves(additive).values()))
    assert all(g.isfinite().all() for g in grads)


def test_fake_tensors_need_no_memory() -> None:
    x = torch.empty(1 << 20, 1 << 20, device="meta")
    v, u = torch.empty(1 << 20, 8, device="meta"), torch.empty(16, 8, device="meta")
    assert ops.low_rank_linear(x, v, u).shape == (1 << 20, 16)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["mlp", "dense", "attention"])
def test_compile_with_norm_and_residual(name: str, dynamic: bool) -> None:
    case = CASES[name]
    tensors = convert(case.draw(), torch.float32, grad=True)

    def f(tensors: dict) -> Tensor:
        call = getattr(ops, case.op)
        return call(**tensors, **case.options, epsilon=1e-5, residual=2 * tensors["x"]
                    if name != "attention" else None)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors), f(tensors))
