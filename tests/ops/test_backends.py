"""The choice of backend, its refusals, and what the C++ kernel makes of odd input."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.tolerance import assert_close_to_float64

from adacomcat import kernels, ops
from adacomcat.errors import UserError
from adacomcat.ops import backends, reference
from adacomcat.ops.decompositions import truncation_errors

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
    kernel = torch.ops.adacomcat.low_rank_linear_cpu
    _, middle = kernel(**tensors, activation=activation, keep_intermediates=True)
    assert_close_to_float64(middle, exact[1], plain[1], "middle")


@needs_cpp
def test_cpp_checks_its_inputs_itself() -> None:
    kernel = torch.ops.adacomcat.low_rank_linear_cpu
    x, v, u = torch.randn(3, 8), torch.randn(8, 2), torch.randn(5, 2)
    for arguments, message in (
        ((x, v[:7], u, None, None, None), "v must have shape"),
        ((x, v, u[:, :1], None, None, None), "u must have shape"),
        ((x, v, u, torch.randn(4), None, None), "bias must have shape"),
        ((x, v, u, None, None, torch.randn(2, 5)), "residual must have shape"),
        ((x.double(), v, u, None, None, None), "v is Float and x is Double"),
        ((x.double(), v.double(), u.double(), None, None, None), "take float32, bfloat16"),
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
    assert backends.pick("low_rank_linear", x) == "cpp"
    assert backends.pick("low_rank_linear", x.double()) == "reference"
    assert backends.pick("gated_low_rank_linear", x) == "reference"


@needs_cpp
@torch.no_grad()
def test_direct_kernel_only_where_pick_would_take_it() -> None:
    x = torch.randn(3, 8)
    assert backends.direct_kernel("low_rank_mlp", x) is not None
    assert backends.direct_kernel("low_rank_mlp", x.double()) is None
    assert backends.direct_kernel("low_rank_mlp", x.to("meta")) is None
    with backends.use_backend("reference"):
        assert backends.direct_kernel("low_rank_mlp", x) is None


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (12, 0)])
def test_kernels_for_gpus_come_first_where_they_were_faster(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(name: str, op: str, x: torch.Tensor) -> str | None:
        there = {"triton": kernels.KERNELS, "cuda": backends.CUDA_OPS, "cpp": ()}
        return None if op in there.get(name, (op,)) else "no"

    monkeypatch.setattr(backends, "refusal", refusal)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    half, single = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)

    def first(name: str, since: tuple[int, int] = (8, 0)) -> str:
        return name if capability >= since else "reference"

    assert backends.pick("low_rank_mlp", half) == first("triton")
    assert backends.pick("low_rank_mlp", half, keep_intermediates=True) == "reference"
    assert backends.pick("low_rank_attention", half) == first("triton")
    trained = backends.pick("low_rank_attention", half, keep_intermediates=True)
    assert trained == first("triton", (9, 0))
    assert backends.pick("low_rank_linear", half) == "reference"
    assert backends.pick("low_rank_mlp", single) == "reference"
    assert backends.pick("batched_svd", single) == first("cuda")


@pytest.mark.parametrize("capability", [(8, 7), (9, 0)])
def test_without_triton_whole_sublayers_run_in_cuda(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For inference in 16 bits; a measured or forced choice comes first as always."""

    def refusal(name: str, op: str, x: torch.Tensor) -> str | None:
        there = {"triton": (), "cuda": backends.CUDA_OPS, "cpp": ()}
        return None if op in there.get(name, (op,)) else "no"

    def find_spec(name: str) -> object | None:
        return None if name == "triton" else object()

    monkeypatch.setattr(backends, "refusal", refusal)
    monkeypatch.setattr(backends, "find_spec", find_spec)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    half, single = torch.zeros(1, dtype=torch.float16), torch.zeros(1)
    for op in ("low_rank_mlp", "low_rank_attention"):
        assert backends.pick(op, half) == "cuda"
        assert backends.pick(op, half, keep_intermediates=True) == "reference"
        assert backends.pick(op, single) == "reference"
    assert backends.pick("dense_mlp", half) == "reference"
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    assert backends.pick("low_rank_mlp", half) == "reference"


def test_compatible_backends() -> None:
    x, double = torch.zeros(3, 8), torch.zeros(3, 8).double()
    kernel = [] if backends.available()["cpp"] else ["cpp"]
    assert backends.compatible_backends("low_rank_mlp", x) == [*kernel, "reference"]
    assert backends.compatible_backends("low_rank_mlp", double) == ["reference"]
    assert backends.compatible_backends("gated_low_rank_linear", x) == ["reference"]
    assert backends.compatible_backends("batched_svd", double) == [*kernel, "reference"]
    for name in backends.compatible_backends("low_rank_linear", x):
        with backends.use_backend(name):
            assert ops.low_rank_linear(x, torch.zeros(8, 2), torch.zeros(5, 2)).shape == (3, 5)
    with pytest.raises(UserError, match="'low_rank' is no op with kernels.*low_rank_linear"):
        backends.compatible_backends("low_rank", x)


def test_use_backend_is_undone_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError), backends.use_backend("reference"):
        raise ZeroDivisionError
    assert backends._FORCED.get() is None


def test_what_is_available() -> None:
    available = backends.available()
    assert available["reference"] is None
    assert set(available) == {"reference", "cpp", "triton", "cuda"}
    best = "reference" if available["cpp"] else "cpp"
    assert backends.pick("low_rank_mlp", torch.zeros(1)) == best
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


def test_triton_kernels_are_not_imported_before_they_run() -> None:
    program = (
        "import sys; from adacomcat import ops; from adacomcat.ops import backends; "
        "print([m for m in sys.modules if m.startswith('adacomcat.kernels.')])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_triton_refuses_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_no_triton", lambda: None)
    x = torch.randn(3, 8)
    with backends.use_backend("triton"):
        with pytest.raises(UserError, match="'triton' cannot run low_rank_linear.*input is on cpu"):
            ops.low_rank_linear(x, torch.randn(8, 2), torch.randn(5, 2))
    assert "no Triton kernel" in backends.refusal("triton", "batched_svd", x)


class OnGpu:
    """What backends look at of a tensor on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = shape, dtype

    def element_size(self) -> int:
        return self.dtype.itemsize


@pytest.mark.parametrize("op, x, capability, reason", [
    ("gated_mlp", OnGpu((3, 8)), (9, 0), "no CUDA kernel; those with one are low_rank_linear"),
    ("low_rank_mlp", OnGpu((3, 8)), (7, 5), "this GPU is sm_75"),
    ("low_rank_attention", OnGpu((3, 8), torch.float64), (8, 7), "takes float32, bfloat16"),
    ("low_rank_mlp", OnGpu((3, 8), torch.float16), (8, 7), None),
    ("low_rank_attention", OnGpu((3, 8), torch.bfloat16), (9, 0), None),
    ("dense_mlp", OnGpu((3, 8)), (8, 0), None),
    ("gated_low_rank_linear", OnGpu((3, 8)), (8, 0), None),
    ("batched_svd", torch.empty(4, 4), (9, 0), "the input is on cpu"),
    ("low_rank_linear", OnGpu((3, 8)), (7, 5), "this GPU is sm_75"),
    ("low_rank_linear", OnGpu((3, 8), torch.float64), (9, 0), "takes float32, bfloat16, float16"),
    ("truncation_errors", OnGpu((3, 8), torch.float16), (9, 0), "takes float32, float64"),
    ("batched_svd", OnGpu((2, 129, 5)), (9, 0), "up to 128 x 128 and this one is 129 x 5"),
    ("batched_svd", OnGpu((2, 128, 128), torch.float64), (8, 6), "135000 bytes.*GPU has 101376"),
    ("batched_svd", OnGpu((2, 128, 128), torch.float64), (9, 0), None),
    ("batched_svd", OnGpu((2, 128, 128)), (8, 6), None),
    ("low_rank_linear", OnGpu((3, 8), torch.bfloat16), (8, 0), None),
], ids=lambda value: None if isinstance(value, torch.Tensor | OnGpu) else str(value))
def test_cuda_refuses_with_the_reason(op: str, x: object, capability: tuple[int, int],
                                      reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(major=capability[0], minor=capability[1],
                          shared_memory_per_block_optin=232448 if capability[1] == 0 else 101376)
    built = SimpleNamespace(svd_shared_memory=lambda m, n, size: size * m * n + 3928)
    monkeypatch.setattr(backends, "_no_cuda", lambda: None)
    monkeypatch.setattr(backends.extension, "MODULE", built)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    found = backends.refusal("cuda", op, x)
    assert found is None if reason is None else re.search(reason, found)
    if reason is None:
        with backends.use_backend("cuda"):
            assert backends.pick(op, x) == "cuda"
            kernel = backends.kernel(op, x)
        assert f"{op}_cuda" in str(getattr(kernel, "func", kernel))


def test_error_curves_are_not_refused_on_the_cpu() -> None:
    """truncation_errors has a CUDA kernel only, and needs none."""
    with backends.use_backend("reference"):
        expected = truncation_errors(torch.ones(2, 3))
    assert expected.tolist() == [6, 4, 2, 0]
    if backends.available()["cpp"] is None:
        with backends.use_backend("cpp"):
            assert torch.equal(truncation_errors(torch.ones(2, 3)), expected)
