"""What ops refuse, in the same words on every path; and that one registry knows every op."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.op_cases import CASES, convert
from torch import Tensor

from adacomcat import ops
from adacomcat.errors import UserError
from adacomcat.ops import autograd, backends, reference, registry, shapes

needs_cpp = pytest.mark.skipif(
    backends.available()["cpp"] is not None, reason=str(backends.available()["cpp"])
)

WRONG = {
    "v must have shape": ("linear-odd", "v", (36, 13)),
    "u must have shape": ("linear-odd", "u", (53, 12)),
    "bias must have shape": ("linear-odd", "bias", (52,)),
    "residual must have shape": ("linear-odd", "residual", (3, 5, 52)),
    "gate must have shape": ("gated", "gate", (18,)),
    "u1 must have shape": ("mlp", "u1", (128, 12)),
    "v2 must have shape": ("mlp", "v2", (127, 13)),
    "w1 must have shape": ("dense", "w1", (75, 31)),
    "w2 must have shape": ("dense", "w2", (32, 74)),
    "wk must have shape": ("attention", "wk", (18, 24)),
    "do not split into 3 heads": ("attention", "wv", (28, 24)),
    "wo must have shape": ("attention", "wo", (24, 26)),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("message", WRONG)
def test_wrong_shapes_are_named(message: str, device: str) -> None:
    name, argument, shape = WRONG[message]
    case = CASES[name]
    tensors = {n: t if t is None else t.to(device) for n, t in case.draw().items()}
    tensors[argument] = torch.zeros(shape, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=message):
        case.call(tensors)


def test_mixed_dtypes_and_unknown_activations_are_named() -> None:
    tensors = CASES["linear-odd"].draw()
    with pytest.raises(RuntimeError, match="v is torch.float32 and x is torch.float64"):
        ops.low_rank_linear(tensors["x"], tensors["v"].float(), tensors["u"])
    with pytest.raises(UserError, match="unknown activation 'swish'.*silu"):
        ops.low_rank_linear(tensors["x"], tensors["v"], tensors["u"], activation="swish")


def test_formulas_refuse_unknown_activations() -> None:
    """They end in an error, so that a name which one of them lacks does not pass as another."""
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        reference.activate(x, "swish")
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        autograd._activation_backward(x, x, "swish")


# What the direct path, which calls a C++ kernel without the dispatcher, must refuse like the op.
MALFORMED = {
    **{f"{case}-{argument}": (case, argument, shape) for case, argument, shape in WRONG.values()
       if case != "gated"},
    "mlp-b1": ("mlp", "b1", (127,)), "mlp-b2": ("mlp", "b2", (31,)), "mlp-u2": ("mlp", "u2", (32,)),
    "dense-b1": ("dense", "b1", (76,)), "dense-b2": ("dense", "b2", (32, 1)),
    "attention-wq": ("attention", "wq", (15, 23)), "attention-bq": ("attention", "bq", (14,)),
    "attention-x": ("attention", "x", (197, 24)), "attention-bo": ("attention", "bo", (25,)),
}


def raised(call: Callable[[], object]) -> tuple[type, str]:
    with pytest.raises(RuntimeError) as caught:
        call()
    return caught.type, str(caught.value).partition("\n")[0]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["shape", "dtype"])
@pytest.mark.parametrize("name, argument, shape", MALFORMED.values(), ids=MALFORMED.keys())
@torch.no_grad()
def test_the_direct_path_raises_what_the_op_raises(name: str, argument: str, shape: tuple,
                                                   dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = convert(case.draw(), torch.float32)
    if dtype == torch.float64 and argument != "x":  # the shape is right, the dtype is not
        shape = case.shapes[argument]
    tensors[argument] = torch.zeros(shape, dtype=torch.float32 if argument == "x" else dtype)
    assert backends.direct_kernel(case.op, tensors["x"]) is not None
    arguments = {**tensors, **case.options}
    op = getattr(torch.ops.adacomcat, case.op)
    assert raised(lambda: case.call(tensors)) == raised(
        lambda: op(**arguments, keep_intermediates=False))


@needs_cpp
@pytest.mark.parametrize("name", ["mlp", "dense", "attention"])
@pytest.mark.parametrize("residual", [torch.zeros(1, 32), torch.zeros(2, 197, 32).double()],
                         ids=["shape", "dtype"])
def test_a_residual_that_does_not_fit_is_named_on_every_path(name: str, residual: Tensor) -> None:
    case = CASES[name]
    tensors = convert(case.draw(), torch.float32)
    call = getattr(ops, case.op)
    with torch.no_grad():
        direct = raised(lambda: call(**tensors, **case.options, residual=residual))
    with backends.use_backend("reference"):
        dispatched = raised(lambda: call(**tensors, **case.options, residual=residual))
    assert "residual" in direct[1] and direct == dispatched


@needs_cpp
def test_other_errors_of_a_kernel_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(backends, "_compiled", lambda op, device: fail)
    run = backends._compiled_kernel.__wrapped__("low_rank_linear", "cpu")
    x, v, u = torch.zeros(3, 8), torch.zeros(8, 2), torch.zeros(5, 2)
    with pytest.raises(RuntimeError, match="^out of memory$"):
        run(x, v, u, None, None, None)
    with pytest.raises(RuntimeError, match="^v must have shape"):
        run(x, v[:7], u, None, None, None)


# The registry.


def test_every_compiled_kernel_is_registered() -> None:
    for op in {*backends.CPP_OPS, *backends.CUDA_OPS}:
        assert registry.OPS[op].contract is getattr(shapes, op)
        for device in backends.compiled_for(op):
            assert hasattr(torch.ops.adacomcat, backends.compiled_name(op, device))


def test_only_the_registry_registers_with_pytorch() -> None:
    package = Path(ops.__file__).parents[1]
    users = {path.name for path in package.rglob("*.py") if "kernels" not in path.parts
             and re.search(r"torch\.library|register_flop_formula", path.read_text())}
    assert users == {"registry.py"}


def test_public_modules_of_the_ops_resolve() -> None:
    program = ("import adacomcat; print(adacomcat.ops.backends.pick.__name__, "
               "adacomcat.ops.decompositions.batched_svd.__name__)")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == ["pick", "batched_svd"], run.stderr
