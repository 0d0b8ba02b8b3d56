"""Cases of all ops: inputs, formulas as oracles, the tolerance, and a call of the launchers.

The interpreter, the emulator and the GPU run the same cases. Importing this module loads no kernel.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# dtype and torch.set_float32_matmul_precision: "high" lets float32 products be tf32.
DTYPES = {
    "fp16": (torch.float16, "highest"),
    "bf16": (torch.bfloat16, "highest"),
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
}
# One unit in the last place of the operands.
UNITS = {"fp16": 2.0**-10, "bf16": 2.0**-7, "fp32": 2.0**-22, "tf32": 2.0**-10}
FLOOR = 1e-6
EPSILON = 1e-6


@dataclass(frozen=True)
class Case:
    """One call of an op: sizes, options, and which tensors are absent or oddly laid out."""

    op: str
    name: str
    sizes: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    strided: tuple[str, ...] = ()
    # Inference: layer norm before, residual after; the incoming gradient serves as the residual.
    sublayer: bool = False

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}" + ("-sublayer" if self.sublayer else "")


def activate(x: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if activation == "silu":
        return x * torch.sigmoid(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return x.clamp_min(0) if activation == "relu" else x


def low_rank_linear(x, v, u, bias, activation, residual) -> Tensor:
    y = x @ v @ u.t()
    y = activate(y if bias is None else y + bias, activation)
    return y if residual is None else y + residual


def gated_low_rank_linear(x, v, gate, u, bias) -> Tensor:
    y = (x @ v * gate) @ u.t()
    return y if bias is None else y + bias


def low_rank_mlp(x, v1, u1, b1, v2, u2, b2, activation) -> Tensor:
    hidden = low_rank_linear(x, v1, u1, b1, activation, None)
    return low_rank_linear(hidden, v2, u2, b2, None, None)


def projected(x: Tensor, v: Tensor | None, w: Tensor, bias: Tensor | None) -> Tensor:
    y = (x if v is None else x @ v) @ w.t()
    return y if bias is None else y + bias


def gated_mlp(x, v1, wg, bg, w1, b1, v2, w2, b2, activation) -> Tensor:
    gate = activate(projected(x, v1, wg, bg), activation)
    return projected(gate * projected(x, v1, w1, b1), v2, w2, b2)


def split_heads(t: Tensor, num_heads: int) -> Tensor:
    return t.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def low_rank_attention(x, wq, bq, wk, wv, wo, bo, num_heads, scale, attn_mask) -> Tensor:
    q, k, v = (split_heads(projected(x, None, w, b), num_heads)
               for w, b in ((wq, bq), (wk, None), (wv, None)))
    return projected(attended(q, k, v, scale, attn_mask), None, wo, bo)


def rotary_attention(x, vq, wq, bq, vk, wk, bk, wv, wo, bo, num_heads, scale, sin, cos, half,
                     attn_mask) -> Tensor:
    q, k, v = (split_heads(projected(x, v, w, b), num_heads)
               for v, w, b in ((vq, wq, bq), (vk, wk, bk), (None, wv, None)))
    if sin is not None:
        q, k = turned(q, sin, cos, half), turned(k, sin, cos, half)
    return projected(attended(q, k, v, scale, attn_mask), None, wo, bo)


def turned(t: Tensor, sin: Tensor, cos: Tensor, half: bool) -> Tensor:
    """The last tokens of t with each pair (a, b) of elements turned."""
    pairs, still = t.shape[-1] // 2, t.shape[-2] - sin.shape[-2]
    at_a, at_b = (slice(pairs), slice(pairs, None)) if half else (slice(0, None, 2),
                                                                  slice(1, None, 2))
    result, last = t.clone(), t[..., still:, :]
    a, b = last[..., at_a], last[..., at_b]
    result[..., still:, at_a] = a * cos[..., at_a] - b * sin[..., at_a]
    result[..., still:, at_b] = b * cos[..., at_b] + a * sin[..., at_b]
    return result


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float, attn_mask: Tensor | None) -> Tensor:
    """The contexts of all heads beside each other."""
    logits = q @ k.transpose(-2, -1) * scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    # A row that is masked entirely has probabilities of zero.
    nothing = (logits == -math.inf).all(-1, keepdim=True)
    p = logits.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return (p @ v).transpose(1, 2).flatten(2)


def normalized(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + EPSILON).sqrt()


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "low_rank_linear": low_rank_linear,
    "gated_low_rank_linear": gated_low_rank_linear,
    "low_rank_mlp": low_rank_mlp,
    "low_rank_attention": low_rank_attention,
    "gated_mlp": gated_mlp,
    "rotary_attention": rotary_attention,
}
# The arguments of each op in order; those in capitals are no tensors.
ARGUMENTS = {
    "low_rank_linear": ("x", "v", "u", "bias", "ACTIVATION", "residual"),
    "gated_low_rank_linear": ("x", "v", "gate", "u", "bias"),
    "low_rank_mlp": ("x", "v1", "u1", "b1", "v2", "u2", "b2", "ACTIVATION"),
    "low_rank_attention": (
        "x", "wq", "bq", "wk", "wv", "wo", "bo", "NUM_HEADS", "SCALE", "attn_mask",
    ),
    "gated_mlp": ("x", "v1", "wg", "bg", "w1", "b1", "v2", "w2", "b2", "ACTIVATION"),
    "rotary_attention": (
        "x", "vq", "wq", "bq", "vk", "wk", "bk", "wv", "wo", "bo", "NUM_HEADS", "SCALE",
        "sin", "cos", "HALF", "attn_mask",
    ),
}  # fmt: skip
# The gradients of the backward launchers, for ops that have them. The residual's gradient is the
# incoming one.
DIFFERENTIATED = {
    "low_rank_linear": ("x", "v", "u", "bias"),
    "gated_low_rank_linear": ("x", "v", "gate", "u", "bias"),
    "low_rank_mlp": ("x", "v1", "u1", "b1", "v2", "u2", "b2"),
    "low_rank_attention": ("x", "wq", "bq", "wk", "wv", "wo", "bo"),
}


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    s = case.sizes
    if case.op in ("low_rank_linear", "gated_low_rank_linear"):
        lead, d, r, out = s["lead"], s["d"], s["r"], s["out"]
        return {
            "x": (*lead, d), "v": (d, r), "gate": (r,), "u": (out, r), "bias": (out,),
            "residual": (*lead, out),
        }  # fmt: skip
    if case.op == "low_rank_mlp":
        lead, d, r1, hidden, r2, out = (s[k] for k in ("lead", "d", "r1", "hidden", "r2", "out"))
        return {
            "x": (*lead, d), "v1": (d, r1), "u1": (hidden, r1), "b1": (hidden,),
            "v2": (hidden, r2), "u2": (out, r2), "b2": (out,),
        }  # fmt: skip
    if case.op == "gated_mlp":
        lead, d, r1, hidden, r2, out = (s[k] for k in ("lead", "d", "r1", "hidden", "r2", "out"))
        inner, outer = (d if r1 is None else r1), (hidden if r2 is None else r2)
        return {
            "x": (*lead, d), "v1": (d, inner), "wg": (hidden, inner), "bg": (hidden,),
            "w1": (hidden, inner), "b1": (hidden,), "v2": (hidden, outer), "w2": (out, outer),
            "b2": (out,),
        }  # fmt: skip
    batch, n, d, heads = s["batch"], s["tokens"], s["d"], case.options["NUM_HEADS"]
    if case.op == "rotary_attention":
        qk, vo = heads * s["head_dim"], heads * s["rank_vo"]
        rank_q, rank_k = (d if r is None else r for r in (s["rank_q"], s["rank_k"]))
        angles = (*s["angles"], s["turned"], s["head_dim"])
        return {
            "x": (batch, n, d), "vq": (d, rank_q), "wq": (qk, rank_q), "bq": (qk,),
            "vk": (d, rank_k), "wk": (qk, rank_k), "bk": (qk,), "wv": (vo, d), "wo": (d, vo),
            "bo": (d,), "sin": angles, "cos": angles,
        }  # fmt: skip
    qk, vo = heads * s["rank_qk"], heads * s["rank_vo"]
    return {
        "x": (batch, n, d), "wq": (qk, d), "bq": (qk,), "wk": (qk, d), "wv": (vo, d),
        "wo": (d, vo), "bo": (d,),
    }  # fmt: skip


def draw(case: Case, dtype: torch.dtype) -> list[Any]:
    """The arguments of the op, seeded by the case; weights are scaled for outputs near one."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
    shapes, tensors = _shapes(case), {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if name in ("sin", "cos"):
            value = getattr(value, name)()
        elif len(shape) == 2 and name != "x":
            rows_are_outputs = name[0] in "uw"
            value /= max(1, shape[1] if rows_are_outputs else shape[0]) ** 0.5
        value = value.to(dtype)
        if name in case.strided:
            value = value.transpose(-2, -1).contiguous().transpose(-2, -1)
        tensors[name] = None if name in case.absent else value
    if case.op.endswith("attention"):
        tensors["attn_mask"] = _mask(case, dtype, generator)
    named = tensors | case.options
    return [named[name] for name in ARGUMENTS[case.op]]


def _mask(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    kind, s = case.sizes.get("mask"), case.sizes
    if kind is None:
        return None
    n, heads = s["tokens"], case.options["NUM_HEADS"]
    if kind == "additive":
        return torch.randn(1, heads, n, n, generator=generator).to(dtype)
    if kind == "lowest":  # what transformers' causal masks add; every third row is so everywhere
        mask = torch.full((n, n), torch.finfo(dtype).min, dtype=dtype).triu(1)
        mask[::3] = torch.finfo(dtype).min
        return mask
    keep = torch.rand(s["batch"], 1, n, n, generator=generator) < 0.7
    if kind == "keys":
        return keep[:, :, :1]
    keep[:, :, 1::3] = False  # rows that are masked entirely
    return keep


class TensorCores(TorchDispatchMode):
    """Products as on tensor cores, whatever the CPU does: tf32 or 16 bits, summed in float32."""

    def __init__(self, tf32: bool) -> None:
        super().__init__()
        self.tf32 = tf32

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func not in (aten.mm.default, aten.bmm.default, aten.addmm.default,
                        aten.baddbmm.default):
            return func(*args, **(kwargs or {}))
        first, dtype = len(args) - 2, args[-1].dtype
        if dtype == torch.float32 and self.tf32:
            args = (*args[:first], *map(truncate_to_tf32, args[first:]))
        if dtype in (torch.float16, torch.bfloat16):
            args = [a.float() for a in args]
        return func(*args, **(kwargs or {})).to(dtype)


def truncate_to_tf32(x: Tensor) -> Tensor:
    """x without the 13 low bits that tensor cores ignore."""
    return (x.contiguous().view(torch.int32) & -8192).view(torch.float32)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Set torch's float32 matmul precision, which the launchers read."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def differentiate(case: Case, arguments: list[Any], grad: Tensor) -> dict[str, Tensor]:
    """The formula's result and its gradients, in the dtype of the arguments."""
    if case.sublayer:
        x, *others = arguments
        return {"out": FORMULAS[case.op](normalized(x), *others) + grad.to(x.dtype)}
    if case.op not in DIFFERENTIATED:
        return {"out": FORMULAS[case.op](*arguments)}
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in zip(ARGUMENTS[case.op], arguments, strict=True)
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    out = FORMULAS[case.op](
        *(
            leaves.get(name, value)
            for name, value in zip(ARGUMENTS[case.op], arguments, strict=True)
        )
    )
    names = [name for name in DIFFERENTIATED[case.op] if name in leaves]
    grads = torch.autograd.grad(out, [leaves[name] for name in names], grad.to(out.dtype))
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(names, grads, strict=True)}


def oracles(
    case: Case, dtype_name: str, arguments: list[Any], grad: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results in float64, and those of PyTorch's formulas at the same dtype and precision."""
    exact = differentiate(
        case, [_double(value) for value in arguments], grad.double()
    )
    with TensorCores(tf32=dtype_name == "tf32"):
        return exact, differentiate(case, arguments, grad)


def _double(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def run_kernels(
    case: Case, arguments: list[Any], grad: Tensor, tile: object = None
) -> dict[str, Tensor]:
    """The result and the gradients as the launchers compute them."""
    from adacomcat.kernels import load

    module, names = load(case.op), ARGUMENTS[case.op]
    options = dict(tile=tile, epsilon=EPSILON, residual=grad) if case.sublayer else dict(tile=tile)
    if case.op not in DIFFERENTIATED:
        return {"out": module.forward(*arguments, **options)}
    if case.sublayer:
        if case.op == "low_rank_attention":
            arguments = in_one_matrix(arguments)
        return {"out": module.forward(*arguments, keep_intermediates=False, **options)[0]}
    out, *kept = module.forward(*arguments, tile=tile)
    needed = [name for name in DIFFERENTIATED[case.op]]
    present = dict(zip(names, arguments, strict=True))
    needs = [present[name] is not None for name in needed]
    passed = [value for name, value in present.items() if name != "residual"]
    grads = module.backward(grad, *passed, *kept, needs=needs, tile=tile)
    found = {f"d{n}": g for n, g in zip(needed, grads, strict=True) if g is not None}
    return {"out": out} | found


def in_one_matrix(arguments: list[Any]) -> list[Any]:
    """An attention's, whose wq, wk and wv lie one after the other in memory."""
    x, wq, bq, wk, wv, *others = arguments
    joint = torch.cat([wq, wk, wv]).split([len(w) for w in (wq, wk, wv)])
    return [x, joint[0], bq, *joint[1:], *others]


def incoming(case: Case, arguments: list[Any]) -> Tensor:
    """A gradient for the result, seeded by the case."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()) + 1)
    shapes = _shapes(case)
    last = "b2" if case.op.endswith("mlp") else "bo" if case.op.endswith("attention") else "bias"
    shape = (*shapes["x"][:-1], *shapes[last])
    return torch.randn(shape, generator=generator).to(arguments[0].dtype)


def worst(
    actual: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor], unit: float = 0.0
) -> list[str]:
    """The results that exceed the tolerance: twice PyTorch's relative error plus a floor.

    `unit` is added for tensors below 64 elements, and four units where the exact result is zero.
    """
    complaints = []
    for name, value in exact.items():
        if name not in actual or actual[name].shape != value.shape:
            complaints.append(f"{name} has the wrong shape")
            continue
        if actual[name].dtype != plain[name].dtype:
            complaints.append(f"{name} has the wrong type")
        if value.numel() == 0:
            continue
        error, allowed = (relative_error(t[name], value) for t in (actual, plain))
        few = unit if value.numel() < 64 else 0.0  # few roundings do not average out
        zero = 4 * unit if value.norm() < 1e-9 else 0.0  # absolute, for sums of numbers near one
        if not error <= 2 * allowed + FLOOR + few + zero:
            complaints.append(f"{name}: {error:.2e} exceeds twice {allowed:.2e}")
    return complaints


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; per element if the exact result is zero."""
    norm = exact.norm().item()
    scale = norm if norm >= 1e-9 else exact.numel() ** 0.5
    return ((actual.double() - exact).norm() / scale).item()
