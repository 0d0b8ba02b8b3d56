"""Every op against a float64 oracle: values, gradients, dtypes, layouts, compilation, errors."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import assert_close_to_float64
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adacomcat import ops
from adacomcat.errors import UserError
from adacomcat.ops import backends, registry, shapes

needs_cpp = pytest.mark.skipif(
    backends.available()["cpp"] is not None, reason=str(backends.available()["cpp"])
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def activation_by_formula(x: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    return x.clamp_min(0) if activation == "relu" else x


def plain_linear(x, v, u, bias=None, activation=None, residual=None) -> Tensor:
    y = torch.matmul(torch.matmul(x, v), u.t())
    y = y if bias is None else y + bias
    y = activation_by_formula(y, activation)
    return y if residual is None else y + residual


def plain_gated(x, v, gate, u, bias=None) -> Tensor:
    return torch.matmul(torch.matmul(x, v) * gate, u.t()) + bias


def plain_mlp(x, v1, u1, b1, v2, u2, b2, activation) -> Tensor:
    return plain_linear(plain_linear(x, v1, u1, b1, activation), v2, u2, b2)


def plain_dense(x, w1, b1, w2, b2, activation) -> Tensor:
    hidden = x @ w1.t() if b1 is None else x @ w1.t() + b1
    y = activation_by_formula(hidden, activation) @ w2.t()
    return y if b2 is None else y + b2


def plain_attention(x, wq, bq, wk, wv, wo, bo, num_heads, scale, attn_mask=None) -> Tensor:
    q = x @ wq.t() if bq is None else x @ wq.t() + bq
    k, v = x @ wk.t(), x @ wv.t()
    logits = torch.stack(
        [a @ b.transpose(1, 2) for a, b in zip(q.chunk(num_heads, -1), k.chunk(num_heads, -1),
                                               strict=True)], 1
    )
    logits = logits * scale
    if attn_mask is not None:
        additive = attn_mask
        if attn_mask.dtype == torch.bool:
            additive = torch.zeros_like(attn_mask, dtype=x.dtype).masked_fill(~attn_mask, -1e4)
        logits = logits + additive
    p = logits.softmax(-1)
    context = torch.cat([p[:, h] @ z for h, z in enumerate(v.chunk(num_heads, -1))], -1)
    y = context @ wo.t()
    return y if bo is None else y + bo


@dataclass
class Case:
    """One call: tensors (a shape each, or None) and the other arguments, all by name."""

    op: str
    shapes: dict[str, tuple[int, ...] | None]
    options: dict[str, Any] = field(default_factory=dict)
    mask: str | None = None

    @property
    def plain(self) -> Callable[..., Tensor]:
        return {
            "low_rank_linear": plain_linear,
            "gated_low_rank_linear": plain_gated,
            "low_rank_mlp": plain_mlp,
            "dense_mlp": plain_dense,
            "low_rank_attention": plain_attention,
        }[self.op]

    def call(self, tensors: dict[str, Tensor | None]) -> Tensor:
        return getattr(ops, self.op)(**tensors, **self.options)

    def draw(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
        """Seeded normal tensors, weights scaled to keep activations of order one."""
        tensors: dict[str, Tensor | None] = {}
        for name, shape in self.shapes.items():
            fan_in = 1
            if shape is not None and name[0] in "vuw":
                fan_in = shape[0] if name[0] == "v" else shape[1]
            value = None if shape is None else torch.randn(shape) / math.sqrt(max(fan_in, 1))
            if name == "attn_mask" and self.mask == "bool":
                tensors[name] = (value > -0.5).logical_or(torch.eye(shape[-1], dtype=torch.bool))
            else:
                tensors[name] = None if value is None else value.to(dtype)
        return tensors


def linear_case(lead, d, r, out, bias=True, activation=None, residual=False) -> Case:
    shapes = {"x": (*lead, d), "v": (d, r), "u": (out, r), "bias": (out,) if bias else None,
              "residual": (*lead, out) if residual else None}
    return Case("low_rank_linear", shapes, {"activation": activation})


def gated_case(lead, d, r, out) -> Case:
    shapes = {"x": (*lead, d), "v": (d, r), "gate": (r,), "u": (out, r), "bias": (out,)}
    return Case("gated_low_rank_linear", shapes)


def mlp_case(lead, d, r1, hidden, r2, activation, bias=True) -> Case:
    shapes = {"x": (*lead, d), "v1": (d, r1), "u1": (hidden, r1),
              "b1": (hidden,) if bias else None, "v2": (hidden, r2), "u2": (d, r2),
              "b2": (d,) if bias else None}
    return Case("low_rank_mlp", shapes, {"activation": activation})


def dense_case(lead, d, hidden, out, activation, bias=True) -> Case:
    shapes = {"x": (*lead, d), "w1": (hidden, d), "b1": (hidden,) if bias else None,
              "w2": (out, hidden), "b2": (out,) if bias else None}
    return Case("dense_mlp", shapes, {"activation": activation})


def attention_case(b, n, d, heads, rq, rv, mask=None, mask_shape=None, bias=True) -> Case:
    shapes = {"x": (b, n, d), "wq": (heads * rq, d), "bq": (heads * rq,) if bias else None,
              "wk": (heads * rq, d), "wv": (heads * rv, d), "wo": (d, heads * rv),
              "bo": (d,) if bias else None, "attn_mask": mask_shape}
    return Case("low_rank_attention", shapes, {"num_heads": heads, "scale": 0.37}, mask)


CASES = {
    "linear-rank1": linear_case((2, 197), 48, 1, 40),
    "linear-odd": linear_case((3, 5), 37, 13, 53, activation="gelu", residual=True),
    "linear-tanh": linear_case((70,), 33, 7, 65, activation="gelu_tanh"),
    "linear-silu": linear_case((2, 9), 16, 5, 24, bias=False, activation="silu"),
    "linear-relu": linear_case((1, 65), 24, 17, 129, activation="relu", residual=True),
    "linear-vector": linear_case((), 12, 3, 8),
    "linear-empty": linear_case((0, 5), 12, 3, 8, residual=True),
    "gated": gated_case((2, 197), 40, 19, 33),
    "gated-rank1": gated_case((7,), 12, 1, 20),
    "gated-empty": gated_case((0,), 12, 4, 20),
    "mlp": mlp_case((2, 197), 32, 11, 128, 13, "gelu"),
    "mlp-rank1": mlp_case((5,), 16, 1, 40, 1, "silu", bias=False),
    "mlp-empty": mlp_case((0, 7), 16, 4, 40, 6, "gelu_tanh"),
    "mlp-rank0": mlp_case((5,), 16, 0, 40, 0, "gelu"),
    "mlp-hidden0": mlp_case((5,), 16, 4, 0, 3, "gelu"),
    "dense": dense_case((2, 197), 32, 75, 32, "gelu"),
    "dense-odd": dense_case((3, 5), 37, 53, 29, "silu", bias=False),
    "dense-identity": dense_case((9,), 16, 24, 16, None),
    "dense-hidden1": dense_case((70,), 33, 1, 65, "gelu_tanh"),
    "dense-hidden0": dense_case((5,), 16, 0, 8, "gelu"),
    "dense-vector": dense_case((), 12, 20, 8, "relu"),
    "dense-empty": dense_case((0, 7), 16, 40, 16, "gelu"),
    "attention": attention_case(2, 197, 24, 3, 5, 9),
    "attention-wide-qk": attention_case(2, 33, 24, 2, 12, 7, bias=False),
    "attention-rank1": attention_case(1, 17, 16, 4, 1, 1),
    "attention-bool": attention_case(2, 19, 16, 2, 5, 8, "bool", (2, 1, 19, 19)),
    "attention-float": attention_case(3, 19, 16, 2, 8, 5, "float", (1, 2, 19, 19)),
    "attention-empty": attention_case(0, 19, 16, 2, 8, 5),
}
SMALL = ["linear-odd", "gated", "mlp-rank1", "dense-odd", "attention-float", "attention-bool"]
SMALLEST = {
    "linear": linear_case((2, 3), 5, 2, 4, activation="gelu", residual=True),
    "gated": gated_case((3,), 5, 2, 4),
    "mlp": mlp_case((3,), 4, 2, 6, 3, "silu"),
    "dense": dense_case((3,), 4, 6, 5, "gelu"),
    "attention": attention_case(2, 3, 4, 2, 2, 1, "float", (2, 3, 3)),
    "attention-no-mask": attention_case(1, 4, 4, 2, 1, 2),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
small_case = pytest.mark.parametrize("case", [CASES[n] for n in SMALL], ids=SMALL)
smallest_case = pytest.mark.parametrize("case", SMALLEST.values(), ids=SMALLEST.keys())


def convert(tensors: dict[str, Tensor | None], dtype: torch.dtype, grad: bool = False) -> dict:
    """Leaf copies in `dtype`; masks of bools as they are."""
    return {
        name: t if t is None or not t.is_floating_point()
        else t.detach().to(dtype).clone().requires_grad_(grad)
        for name, t in tensors.items()
    }


def leaves(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if t is not None and t.requires_grad}


def value_and_gradients(f: Callable, tensors: dict, grad_out: Tensor, **options: Any) -> dict:
    out = f(**tensors, **options)
    wanted = leaves(tensors)
    grads = torch.autograd.grad(out, list(wanted.values()), grad_out.to(out.dtype))
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


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


def strided(t: Tensor | None) -> Tensor | None:
    """The same values with gaps between them and another order of dimensions in memory."""
    if t is None:
        return None
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan")).to(t.dtype)
    if t.dim() > 1:
        wide = wide.transpose(0, -2).contiguous().transpose(0, -2)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


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
    compiled = torch.compile(f, fullgraph=True)(draws)
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
    run = backends._cpu_kernel.__wrapped__("low_rank_linear")
    x, v, u = torch.zeros(3, 8), torch.zeros(8, 2), torch.zeros(5, 2)
    with pytest.raises(RuntimeError, match="^out of memory$"):
        run(x, v, u, None, None, None)
    with pytest.raises(RuntimeError, match="^v must have shape"):
        run(x, v[:7], u, None, None, None)


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
