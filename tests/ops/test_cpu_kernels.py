"""The C++ kernels on every instruction set of this CPU, against float64."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.cpu_cases import ALL, check_norm_and_residual, each_case, each_dtype
from helpers.instruction_sets import emulator, here, use
from helpers.op_cases import (
    DTYPES,
    Case,
    attention_case,
    convert,
    leaves,
    mlp_case,
    strided,
    value_and_gradients,
)
from helpers.tolerance import assert_close_to_float64

from adacomcat import ops
from adacomcat.ops import autograd_cpu, backends
from adacomcat.ops.reference import ACTIVATIONS


def by_pytorch(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "quick_gelu":
        return F.silu(1.702 * x) / 1.702
    options = {"approximate": "tanh"} if activation == "gelu_tanh" else {}
    return getattr(F, activation.removesuffix("_tanh"))(x, **options)


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
             "dense-hidden", "dense-thin", "attention-197", "attention-float"])
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_over_their_whole_range(activation: str, instruction_set: str) -> None:
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e30, 1e30, 3e38])])
    x = x.unsqueeze(1).requires_grad_()
    one = torch.ones(1, 1)
    y = ops.low_rank_linear(x, one, one, activation=activation)
    slope, = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double().requires_grad_()
    by_pytorch(exact, activation).sum().backward()
    expected = exact.grad.where(exact.grad.isfinite(), (exact.detach() > 0).double())
    torch.testing.assert_close(slope.double(), expected, rtol=3e-6, atol=4e-6)


def test_backward_keeps_less_than_the_formulas_need() -> None:
    """The hidden layer is not saved between the passes."""
    case = mlp_case((50,), 32, 8, 512, 8, "gelu")
    tensors, saved = convert(case.draw(), torch.float32, grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t):
        case.call(tensors)
    inputs = {t.data_ptr() for t in leaves(tensors).values()}
    kept = [t for t in saved if t.data_ptr() not in inputs]
    assert sum(t.numel() for t in kept) == 50 * (8 + 8)


@each_dtype
@pytest.mark.parametrize("name", ["mlp-197", "dense-197", "dense-hidden", "attention-causal"])
def test_norm_and_residual_in_one(name: str, dtype: torch.dtype, instruction_set: str,
                                  poisoned_memory: None) -> None:
    check_norm_and_residual(ALL[name], dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(activation: str, instruction_set: str) -> None:
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e30, 1e30, -0.0, 3e38])])
    one = torch.ones(1, 1)
    y = ops.low_rank_linear(x.unsqueeze(1), one, one, activation=activation).squeeze(1)
    exact = by_pytorch(x.double(), activation)
    torch.testing.assert_close(y.double(), exact, rtol=3e-6, atol=2e-6)


def test_values_that_are_not_numbers_stay_visible(instruction_set: str) -> None:
    v, u = torch.randn(8, 3), torch.randn(5, 3)
    for dtype in DTYPES:
        x = torch.randn(4, 8).to(dtype)
        x[1, 2] = float("nan")
        for activation in (None, *ACTIVATIONS):
            y = ops.low_rank_linear(x, v.to(dtype), u.to(dtype), activation=activation)
            assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all(), activation


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinity_comes_out_as_in_pytorch(value: float, activation: str | None,
                                          instruction_set: str) -> None:
    """Or as NaN, where a float is a sum of parts or has a scale. GELU of -inf may be its limit."""
    for dtype in DTYPES:
        x, v, u = (torch.randn(shape).to(dtype) for shape in ((4, 8), (8, 3), (5, 3)))
        x[1, 2] = value
        y = ops.low_rank_linear(x, v, u, activation=activation)
        expected = backends.reference.low_rank_linear(x, v, u, activation=activation)[0]
        same = (y == expected) | (y.isnan() & expected.isnan())
        if (dtype == torch.bfloat16) == (instruction_set == "avx512_vnni"):
            same |= y.isnan() & (instruction_set in ("amx", "avx512_vnni"))
        if activation == "gelu" and dtype == torch.bfloat16:
            same |= expected.isnan() & (y == 0)
        assert same[1].all() and y[[0, 2, 3]].isfinite().all()


def test_gelu_far_below_zero_is_zero(instruction_set: str) -> None:
    for dtype in DTYPES:
        x = torch.tensor([-9.0, -20.0, -1e3, -6e4]).to(dtype)
        y = ops.low_rank_linear(x[:, None], *2 * [torch.ones(1, 1, dtype=dtype)], activation="gelu")
        assert (y == 0).all()


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
    use(here())
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
    use(here())
    assert not forward and not emulator().tiles_configured()


def test_rows_masked_entirely_give_the_bias(instruction_set: str) -> None:
    case = attention_case(1, 37, 8, 2, 3, 4, "bool", (37, 37))
    tensors = convert(case.draw(), torch.float32)
    tensors["attn_mask"][5] = False
    torch.testing.assert_close(case.call(tensors)[0, 5], tensors["bo"])


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
    program = "from adacomcat.ops import backends; print(backends.build_info()['instruction_set'])"
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
