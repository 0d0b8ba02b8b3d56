"""Calls of every op: shapes, seeded operands, and the same mathematics in plain PyTorch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from adacomcat import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def activation_by_formula(x: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    if activation == "quick_gelu":
        return x / (1 + torch.exp(-1.702 * x))
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
    "linear-quick": linear_case((9,), 16, 5, 24, activation="quick_gelu"),
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


def strided(t: Tensor | None) -> Tensor | None:
    """The same values with gaps between them and another order of dimensions in memory."""
    if t is None:
        return None
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan")).to(t.dtype)
    if t.dim() > 1:
        wide = wide.transpose(0, -2).contiguous().transpose(0, -2)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]
