"""The C++ kernels on every instruction set of this CPU, against float64."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_to_float64
from instruction_sets import HERE, LACKING, NAMES, emulator, use
from test_ops import (
    CASES,
    DTYPES,
    Case,
    attention_case,
    convert,
    dense_case,
    leaves,
    linear_case,
    mlp_case,
    strided,
    value_and_gradients,
)

from adacomcat import ops
from adacomcat.ops import autograd_cpu, backends

# Ranks of one lane less and more than a vector, more columns than a panel, rows off any tile.
SHAPES = {
    "linear-197": linear_case((2, 197), 96, 33, 130, activation="gelu", residual=True),
    "linear-63": linear_case((61,), 31, 63, 15, activation="silu"),
    "linear-out1": linear_case((13,), 129, 17, 1, bias=False),
    "mlp-197": mlp_case((197,), 64, 24, 300, 40, "gelu"),
    "mlp-hidden": mlp_case((2, 50), 48, 15, 129, 65, "gelu_tanh"),
    "mlp-relu": mlp_case((25,), 33, 31, 256, 16, "relu"),
    "dense-197": dense_case((197,), 64, 300, 64, "gelu"),
    "dense-hidden": dense_case((2, 50), 47, 1027, 65, "gelu_tanh"),
    "dense-256": dense_case((25,), 33, 256, 16, "relu", bias=False),
    "linear-1100": linear_case((1100,), 40, 33, 77, activation="gelu"),  # rows in two parts
    "dense-narrow": dense_case((2, 30), 70, 24, 50, "silu"),
    "mlp-identity": mlp_case((9,), 16, 5, 24, 7, None),
    "attention-197": attention_case(2, 197, 64, 4, 16, 24),
    "attention-long": attention_case(1, 523, 32, 2, 8, 33, "float", (1, 2, 523, 523)),
    "attention-wide": attention_case(1, 70, 200, 5, 9, 17),  # panels that end in one vector
    "attention-ranks": attention_case(1, 69, 48, 2, 70, 33),  # squares of keys, and what is left
    "attention-causal": attention_case(2, 65, 48, 3, 17, 7, "bool", (65, 65)),
}
ALL = {name: case for name, case in {**CASES, **SHAPES}.items()
       if case.op != "gated_low_rank_linear"}
each_case = pytest.mark.parametrize("case", ALL.values(), ids=ALL.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=NAMES)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param in LACKING:
        pytest.skip(f"this CPU has no {request.param}")
    assert use(request.param)
    with backends.use_backend("cpp"):
        yield request.param
    use(HERE)


@each_dtype
@each_case
def test_values(case: Case, dtype: torch.dtype, instruction_set: str,
                poisoned_memory: None) -> None:
    base = convert(case.draw(), dtype)
    exact = case.plain(**convert(base, torch.float64), **case.options)
    plain = case.plain(**base, **case.options)
    actual = case.call(base)
    assert_close_to_float64(actual, exact, plain)
    again = case.call({name: strided(t) for name, t in base.items()})
    torch.testing.assert_close(again, actual)


@pytest.mark.parametrize(
    "name", ["linear-197", "linear-1100", "mlp-197", "mlp-hidden", "mlp-identity", "dense-197",
             "dense-hidden", "dense-narrow", "attention-197", "attention-float"])
@each_dtype
def test_gradients(name: str, dtype: torch.dtype, instruction_set: str,
                   poisoned_memory: None) -> None:
    case = ALL[name]
    base = convert(case.draw(), dtype)
    double = convert(base, torch.float64, grad=True)
    grad_out = torch.randn_like(case.plain(**double, **case.options))
    exact = value_and_gradients(case.plain, double, grad_out, **case.options)
    plain, actual = (value_and_gradients(f, convert(base, dtype, grad=True), grad_out,
                                         **case.options)
                     for f in (case.plain, getattr(ops, case.op)))
    for key in exact:
        assert_close_to_float64(actual[key], exact[key], plain[key], key)


@pytest.mark.parametrize("name", ["linear-odd", "linear-197", "mlp", "dense", "attention"])
def test_each_gradient_alone_is_the_same(name: str, instruction_set: str) -> None:
    case = ALL[name]
    tensors = convert(case.draw(), torch.float32, grad=True)
    grad_out = torch.randn_like(case.call(tensors))
    together = value_and_gradients(getattr(ops, case.op), tensors, grad_out, **case.options)
    for wanted in leaves(tensors):
        alone = {n: t if t is None else t.detach().requires_grad_(n == wanted)
                 for n, t in tensors.items()}
        result = value_and_gradients(getattr(ops, case.op), alone, grad_out, **case.options)
        torch.testing.assert_close(result[wanted], together[wanted], rtol=1.3e-6,
                                   atol=1e-4)  # hundreds of terms of both signs in another order


@pytest.mark.parametrize("name", ["attention", "attention-bool", "attention-float"])
def test_gradients_of_few_images_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ALL[name]
    tensors = convert(case.draw(), torch.float32, grad=True)
    grad_out = torch.randn_like(case.call(tensors))
    together = value_and_gradients(getattr(ops, case.op), tensors, grad_out, **case.options)
    monkeypatch.setattr(autograd_cpu, "LOGITS", 1)
    one_by_one = value_and_gradients(getattr(ops, case.op), tensors, grad_out, **case.options)
    for key in together:
        torch.testing.assert_close(one_by_one[key], together[key])


@pytest.mark.parametrize("layout", ["expanded", "strided"])
def test_gradients_may_lie_anyhow_in_memory(layout: str, instruction_set: str) -> None:
    for name in ("linear-197", "mlp", "dense", "attention"):
        case = ALL[name]
        tensors = convert(case.draw(), torch.float32, grad=True)
        y = case.call(tensors)
        grad = torch.randn(()).expand(y.shape)
        if layout == "strided":
            grad = strided(torch.randn_like(y))
        wanted = list(leaves(tensors).values())
        actual = torch.autograd.grad(y, wanted, grad, retain_graph=True)
        expected = torch.autograd.grad(y, wanted, grad.contiguous())
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_slopes_over_their_whole_range(activation: str, instruction_set: str) -> None:
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e30, 1e30, 3e38])])
    x = x.unsqueeze(1).requires_grad_()
    one = torch.ones(1, 1)
    y = ops.low_rank_linear(x, one, one, activation=activation)
    slope, = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double().requires_grad_()
    getattr(F, activation.removesuffix("_tanh"))(
        exact, **({"approximate": "tanh"} if activation == "gelu_tanh" else {})).sum().backward()
    expected = exact.grad.where(exact.grad.isfinite(), (exact.detach() > 0).double())
    torch.testing.assert_close(slope.double(), expected, rtol=3e-6, atol=4e-6)


def test_backward_keeps_less_than_the_formulas_need() -> None:
    """Of the hidden layer nothing is kept between the passes."""
    case = mlp_case((50,), 32, 8, 512, 8, "gelu")
    tensors, saved = convert(case.draw(), torch.float32, grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t):
        case.call(tensors)
    inputs = {t.data_ptr() for t in leaves(tensors).values()}
    kept = [t for t in saved if t.data_ptr() not in inputs]
    assert sum(t.numel() for t in kept) == 50 * (8 + 8)


def check_norm_and_residual(case: Case, dtype: torch.dtype) -> None:
    """A large mean, as residual streams have it, must not cost digits of the variance."""
    base = convert(case.draw(), dtype)
    base["x"] = base["x"] * 3 + 20
    residual = torch.randn_like(case.plain(**base, **case.options))

    def plain(tensors: dict, residual: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(tensors["x"], tensors["x"].shape[-1:], eps=1e-6)
        return case.plain(**{**tensors, "x": x}, **case.options) + residual

    actual = getattr(ops, case.op)(**base, **case.options, epsilon=1e-6, residual=residual)
    exact = plain(convert(base, torch.float64), residual.double())
    assert_close_to_float64(actual, exact, plain(base, residual))


@each_dtype
@pytest.mark.parametrize("name", ["mlp-197", "dense-197", "dense-hidden", "attention-causal"])
def test_norm_and_residual_in_one(name: str, dtype: torch.dtype, instruction_set: str,
                                  poisoned_memory: None) -> None:
    check_norm_and_residual(ALL[name], dtype)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_activations_over_their_whole_range(activation: str, instruction_set: str) -> None:
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e30, 1e30, -0.0, 3e38])])
    one = torch.ones(1, 1)
    y = ops.low_rank_linear(x.unsqueeze(1), one, one, activation=activation).squeeze(1)
    exact = getattr(F, activation.removesuffix("_tanh"))(
        x.double(), **({"approximate": "tanh"} if activation == "gelu_tanh" else {}))
    torch.testing.assert_close(y.double(), exact, rtol=3e-6, atol=2e-6)


def test_values_that_are_not_numbers_stay_visible(instruction_set: str) -> None:
    v, u = torch.randn(8, 3), torch.randn(5, 3)
    for dtype in DTYPES:
        x = torch.randn(4, 8).to(dtype)
        x[1, 2] = float("nan")
        for activation in (None, "gelu", "gelu_tanh", "silu", "relu"):
            y = ops.low_rank_linear(x, v.to(dtype), u.to(dtype), activation=activation)
            assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all(), activation


def test_infinity_stays_visible(instruction_set: str) -> None:
    """As itself or, where a float is a sum of parts, as NaN."""
    x, v, u = torch.randn(4, 8), torch.randn(8, 3), torch.randn(5, 3)
    x[1, 2] = float("inf")
    y = ops.low_rank_linear(x, v, u)
    assert not y[1].isfinite().any() and y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_float32_on_tensor_units_is_no_less_exact(scale: float) -> None:
    """Six products of bfloat16 parts: the error shows if one of them is missing."""
    if not use("amx"):
        pytest.skip("this CPU has no amx")
    generator = torch.Generator().manual_seed(7)
    x, v, u = (torch.randn(shape, generator=generator, dtype=torch.float64).float()
               for shape in ((70, 1536), (1536, 40), (50, 40)))
    x *= scale * torch.logspace(-3, 3, 1536)  # columns of unlike size, as activations have them
    exact = x.double() @ v.double() @ u.double().t()
    with backends.use_backend("cpp"):
        error = (ops.low_rank_linear(x, v, u) - exact).norm()
    use(HERE)
    plain = (x @ v @ u.t() - exact).norm()
    assert error <= 1.2 * plain and plain <= 1e-6 * exact.norm()


@pytest.mark.parametrize("name", ["linear-197", "mlp-197", "dense-197", "attention-197"])
def test_tile_registers_are_given_back(name: str) -> None:
    """Else each switch of tasks would have to save 8 KB of them."""
    if not use("amx"):
        pytest.skip("this CPU has no amx")
    tensors = convert(ALL[name].draw(), torch.float32, grad=True)
    with backends.use_backend("cpp"):
        y = ALL[name].call(tensors)
        forward = emulator().tiles_configured()
        y.sum().backward()
    use(HERE)
    assert not forward and not emulator().tiles_configured()


def test_rows_masked_entirely_give_the_bias(instruction_set: str) -> None:
    case = attention_case(1, 37, 8, 2, 3, 4, "bool", (37, 37))
    tensors = convert(case.draw(), torch.float32)
    tensors["attn_mask"][5] = False
    torch.testing.assert_close(case.call(tensors)[0, 5], tensors["bo"])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_thread_and_several_agree(instruction_set: str, threads: None) -> None:
    """To the last bit, but where threads share out a hidden layer: they add up its parts."""
    for name in ("linear-197", "mlp-197", "dense-197", "attention-197", "attention-wide"):
        tensors = convert(ALL[name].draw(), torch.float32)
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(ALL[name].call(tensors))
            assert torch.equal(results[-1], ALL[name].call(tensors))
        for other in results[1:]:
            exactly = {} if ALL[name].op.endswith("mlp") else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(other, results[0], **exactly)


# Packed weights: every change must be seen.


def products(v: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.eye(v.shape[0])
    return ops.low_rank_linear(x, v, u), v @ u.t()


@pytest.mark.parametrize("change", [
    lambda p: p.add_(1), lambda p: p.data.mul_(2), lambda p: p.copy_(torch.randn_like(p)),
    lambda p: setattr(p, "data", torch.randn_like(p)), lambda p: p.t_().t_().neg_(),
], ids=["add_", "data.mul_", "copy_", "data=", "strides"])
@torch.no_grad()
def test_packed_weights_follow_changes(change: object) -> None:
    v, u = torch.nn.Parameter(torch.randn(40, 9)), torch.nn.Parameter(torch.randn(30, 9))
    torch.testing.assert_close(*products(v, u))
    for parameter in (v, u):
        change(parameter)
        torch.testing.assert_close(*products(v, u))


def test_packed_weights_follow_an_optimizer() -> None:
    v, u = torch.nn.Parameter(torch.randn(40, 9)), torch.nn.Parameter(torch.randn(30, 9))
    optimizer = torch.optim.AdamW([v, u], lr=0.1)
    for _ in range(3):
        ops.low_rank_linear(torch.eye(40), v, u).square().sum().backward()
        optimizer.step()
        with torch.inference_mode():
            torch.testing.assert_close(*products(v, u))


def test_memory_of_a_dead_weight_is_not_mistaken_for_it() -> None:
    u = torch.randn(30, 9)
    for _ in range(20):  # the allocator hands the same memory out again
        v = torch.randn(40, 9)
        torch.testing.assert_close(*products(v, u))
        del v
        gc.collect()


def test_weights_are_shared_between_threads() -> None:
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


@pytest.mark.parametrize("name", ["mlp-197", "dense-197", "attention-197"])
def test_what_followed_may_be_gone(name: str) -> None:
    """Kernels fetch the weights that came next the last time: here of a layer since deleted."""
    case = ALL[name]
    tensors = convert(case.draw(), torch.float32)
    expected = case.call(tensors)
    other = convert(case.draw(), torch.float32)
    case.call(other)
    del other
    gc.collect()
    for _ in range(3):
        torch.testing.assert_close(case.call(tensors), expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_run_on_all_threads(threads: int) -> None:
    program = f"""
import os
import numpy as np
import torch
from adacomcat import ops
torch.set_num_threads({threads})
x, v, u = (torch.from_numpy(np.ones(shape, np.float32))
           for shape in ((394, 384), (384, 64), (384, 64)))
before = len(os.listdir("/proc/self/task"))
with torch.no_grad():
    ops.low_rank_linear(x, v, u)
print(len(os.listdir("/proc/self/task")) - before)"""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                         env=environment)
    assert run.stdout.strip() == str(threads - 1), run.stderr


# The choice of the instruction set and of the kernel.


@pytest.mark.parametrize("name", ["generic", "nonsense"])
def test_environment_variable(name: str) -> None:
    program = "from adacomcat import backends; print(backends.build_info()['instruction_set'])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                         env={"ADACOMCAT_CPU": name, "PATH": ""})
    if name == "generic":
        assert run.stdout.strip() == "generic"
    else:
        assert run.returncode and "ADACOMCAT_CPU=nonsense is not an instruction set" in run.stderr


@pytest.mark.parametrize("name", ["linear-197", "mlp-197", "dense-197", "attention-197"])
def test_opcheck_of_the_kernels(name: str) -> None:
    case = ALL[name]
    op = getattr(torch.ops.adacomcat, f"{case.op}_cpu").default
    tensors = {**convert(case.draw(), torch.float32), **case.options}
    order = [a.name for a in op._schema.arguments if a.name in tensors]
    for keep in (True, False):
        torch.library.opcheck(op, tuple(tensors[n] for n in order), {"keep_intermediates": keep})


def test_kept_intermediates_are_those_of_the_reference() -> None:
    for name in ("linear-odd", "mlp", "attention"):
        case = ALL[name]
        tensors = convert(case.draw(), torch.float32)
        assert not leaves(tensors)
        kernel = getattr(torch.ops.adacomcat, f"{case.op}_cpu")
        actual = kernel(**tensors, **case.options, keep_intermediates=True)
        expected = getattr(backends.reference, case.op)(**tensors, **case.options)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
