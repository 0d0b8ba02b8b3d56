"""The choice of backend, its refusals, and the C++ kernel against float64."""

import subprocess
import sys

import pytest
import torch
from conftest import assert_close_to_float64

from adacomcat import backends, ops, reference
from adacomcat.errors import UserError

needs_cpp = pytest.mark.skipif(
    backends.available()["cpp"] is not None, reason=str(backends.available()["cpp"])
)
SHAPES = {
    "tokens": ((2, 197), 48, 12, 96),
    "rank-1": ((3, 5), 31, 1, 17),
    "odd": ((129,), 65, 33, 71),
    "vector": ((), 8, 3, 4),
    "one-row": ((1,), 7, 5, 130),
    "empty": ((0, 4), 8, 3, 4),
    "rank-0": ((4,), 8, 0, 5),
    "width-0": ((4,), 0, 2, 5),
}


def draw(lead: tuple[int, ...], d: int, r: int, out: int) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(*lead, d),
        "v": torch.randn(d, r) / max(d, 1) ** 0.5,
        "u": torch.randn(out, r) / max(r, 1) ** 0.5,
        "bias": torch.randn(out),
        "residual": torch.randn(*lead, out),
    }


@needs_cpp
@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_cpp_low_rank_linear(shape: tuple, activation: str | None, poisoned_memory: None) -> None:
    tensors = draw(*shape)
    double = {n: t.double() for n, t in tensors.items()}
    exact = reference.low_rank_linear(**double, activation=activation)
    plain = reference.low_rank_linear(**tensors, activation=activation)
    with backends.use_backend("cpp"):
        actual = ops.low_rank_linear(**tensors, activation=activation)
    assert_close_to_float64(actual, exact[0], plain[0])
    _, middle = torch.ops.adacomcat.low_rank_linear_cpu(**tensors, activation=activation)
    assert_close_to_float64(middle, exact[1], plain[1], "middle")


@needs_cpp
@pytest.mark.parametrize("missing", [("bias",), ("residual",), ("bias", "residual")], ids=str)
def test_cpp_without_bias_or_residual(missing: tuple[str, ...], poisoned_memory: None) -> None:
    tensors = {n: t for n, t in draw((70,), 20, 6, 40).items() if n not in missing}
    expected = ops.low_rank_linear(**tensors, activation="gelu")
    with backends.use_backend("cpp"):
        actual = ops.low_rank_linear(**tensors, activation="gelu")
    torch.testing.assert_close(actual, expected)


@needs_cpp
def test_cpp_reads_any_strides(poisoned_memory: None) -> None:
    whole_v, whole_u = torch.randn(20, 32), torch.randn(40, 32)
    x = torch.randn(20, 7, 5).permute(2, 1, 0)
    residual, bias = torch.randn(40, 7, 5).permute(2, 1, 0), torch.randn(80)[::2]
    for v, u in (
        (whole_v[:, :11], whole_u[:, :11]),
        (whole_v[:, ::3], whole_u[:, ::3]),
        (torch.randn(11, 20).t(), torch.randn(11, 40).t()),
        (torch.randn(20, 1).expand(20, 11), torch.randn(1, 11).expand(40, 11)),
    ):
        expected = ops.low_rank_linear(x, v, u, bias, residual=residual)
        with backends.use_backend("cpp"):
            actual = ops.low_rank_linear(x, v, u, bias, residual=residual)
        torch.testing.assert_close(actual, expected)


@needs_cpp
def test_cpp_gradients(poisoned_memory: None) -> None:
    single = {n: t.requires_grad_() for n, t in draw((3, 150), 24, 8, 72).items()}
    double = {n: t.detach().double().requires_grad_() for n, t in single.items()}
    grad = torch.randn(3, 150, 72)

    def gradients(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        out = ops.low_rank_linear(**tensors, activation="gelu")
        return torch.autograd.grad(out, list(tensors.values()), grad.to(out.dtype))

    with backends.use_backend("cpp"):
        actual = gradients(single)
    for name, *triple in zip(single, actual, gradients(double), gradients(single), strict=True):
        assert_close_to_float64(*triple, name)


@needs_cpp
def test_cpp_checks_its_inputs_itself() -> None:
    kernel = torch.ops.adacomcat.low_rank_linear_cpu
    x, v, u = torch.randn(3, 8), torch.randn(8, 2), torch.randn(5, 2)
    for arguments, message in (
        ((x, v[:7], u, None, None, None), "v must have shape"),
        ((x, v, u[:, :1], None, None, None), "u must have shape"),
        ((x, v, u, torch.randn(4), None, None), "bias must have shape"),
        ((x, v, u, None, None, torch.randn(2, 5)), "residual must have shape"),
        ((x.double(), v, u, None, None, None), "x must be float32"),
        ((x, v, u, None, "swish", None), "unknown activation 'swish'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernel(*arguments)


@needs_cpp
def test_cpp_refuses_with_the_reason() -> None:
    x, v, u = torch.randn(3, 8), torch.randn(8, 2), torch.randn(5, 2)
    with backends.use_backend("cpp"):
        assert backends.pick("low_rank_linear", x) == "cpp"
        with pytest.raises(UserError, match="'cpp' cannot run low_rank_linear.*float64"):
            ops.low_rank_linear(x.double(), v.double(), u.double())
        with pytest.raises(UserError, match="'cpp' cannot run gated_low_rank_linear.*no C\\+\\+"):
            ops.gated_low_rank_linear(x, v, torch.ones(2), u)
        with backends.use_backend("reference"):
            assert backends.pick("low_rank_linear", x.double()) == "reference"
        assert backends.pick("low_rank_linear", x) == "cpp"
    assert backends.pick("low_rank_linear", x) == "reference"


def test_use_backend_is_undone_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError), backends.use_backend("reference"):
        raise ZeroDivisionError
    assert backends._FORCED.get() is None


def test_what_is_available() -> None:
    available = backends.available()
    assert available["reference"] is None
    assert set(available) == {"reference", "cpp", "triton", "cuda"}
    assert backends.pick("low_rank_mlp", torch.zeros(1)) == "reference"
    with pytest.raises(UserError, match="unknown backend 'tpu'.*reference, cpp"):
        with backends.use_backend("tpu"):
            pass
    for name, reason in available.items():
        if reason is not None:
            with pytest.raises(UserError, match=f"'{name}' is not available here"):
                with backends.use_backend(name):
                    pass


def test_everything_runs_without_the_extension() -> None:
    """A process in which adacomcat._C cannot be found, as after ADACOMCAT_NO_EXT=1."""
    program = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "adacomcat._C":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import torch
from adacomcat import backends, ops
from adacomcat.errors import UserError
print(backends.available()["cpp"], backends.build_info())
x, v, u = torch.randn(3, 8), torch.randn(8, 2), torch.randn(5, 2, requires_grad=True)
ops.low_rank_linear(x, v, u, activation="gelu").sum().backward()
print(u.grad.shape)
try:
    with backends.use_backend("cpp"):
        pass
except UserError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, second, third = run.stdout.splitlines()
    assert "was not built" in first and first.endswith("None")
    assert second == "torch.Size([5, 2])"
    assert third.startswith("backend 'cpp' is not available here: the C++ extension was not built")
