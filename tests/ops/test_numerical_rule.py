"""Seeded adversarial operands against the rule in docs/numerics.md, on every instruction set.

Each check is one result against float64. NUMERICAL_CHECKS multiplies how many are drawn.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from helpers import adversarial
from helpers.adversarial import chosen
from helpers.matrices import LOW_RANKS, check, of_low_rank
from helpers.op_cases import DTYPES, activation_by_formula
from torch import Tensor

from adacomcat import ops
from adacomcat.ops import decompositions, reference

DRAWS = int(120 * float(os.environ.get("NUMERICAL_CHECKS", "1")))
ACTIVATIONS = [None, "gelu", "gelu_tanh", "silu", "relu", "quick_gelu"]
# The units in the last place that every sum of products may lose.
UNITS = 4.0
# Absolute error of an activation near zero: 16-bit polynomials, and all others.
TAILS = {torch.float32: 2e-6, torch.bfloat16: 2.5e-4, torch.float16: 2e-6}
# Engines that see infinity as NaN, for these dtypes; what multiplies no denormals; integers.
NO_INFINITY = {"amx": (torch.float32, torch.float16), "avx512_vnni": (torch.bfloat16,)}
NO_DENORMALS = ("amx", "avx512_bf16")
POLYNOMIALS = ("amx", "avx512_bf16", "avx512_vnni")  # GELU by max(x, 0) - tail(|x|)


def some(values: list) -> Any:
    return values[chosen(len(values))]


def sizes(most: int, count: int) -> list[int]:
    """A few sizes up to `most`, zero and one among them now and then."""
    return [chosen(most) if chosen(12) else chosen(2) for _ in range(count)]


def operands(shapes: list[tuple[int, ...]], dtype: torch.dtype, infinite: int) -> list[Tensor]:
    """One operand of a hostile kind, the others normal and of the size that keeps sums near one.

    The first `infinite` operands may hold infinity. Of the others rounding would decide the sign of
    the sums that it meets.
    """
    hostile = chosen(len(shapes))
    kinds = [kind for kind in adversarial.KINDS if kind != "infinity" or hostile < infinite]
    found = []
    for i, shape in enumerate(shapes):
        kind = some(kinds) if i == hostile else "normal"
        weight = adversarial.draw(kind, shape, dtype)
        found.append(weight if i == 0 else (weight / max(shape[-1], 1) ** 0.5).to(dtype))
    return found


@dataclass
class Call:
    """One call of an op: what it ran on, and what its promise depends on."""

    instruction_set: str
    dtype: torch.dtype
    activation: str | None
    tensors: list[Tensor]

    def may_be_nan(self, found: Tensor) -> Tensor:
        """Where NaN stands for what an infinite operand leads to."""
        lost = self.dtype in NO_INFINITY.get(self.instruction_set, ())
        infinite = not all(t.isfinite().all() for t in self.tensors)
        return found.isnan() & lost & infinite

    def special_values_are_kept(self, found: Tensor, exact: Tensor) -> Tensor:
        same = (found.double() == exact) | (found.isnan() & exact.isnan())
        if (self.activation == "gelu" and self.dtype == torch.bfloat16
                and self.instruction_set in POLYNOMIALS):
            same |= exact.isnan() & found.isfinite()  # GELU of -inf is 0
        return same | self.may_be_nan(found)

    def assert_rule(self, found: Tensor, exact: Tensor, scale: Tensor, units: float,
                    tail: Tensor | float = 0.0) -> None:
        """|found - exact| ≤ units · ε · scale + tail, and the same infinities and NaN.

        `scale` is the sum of the sizes of all terms. Elements whose terms leave the dtype's range
        are not compared: they may overflow on the way.
        """
        info, finite = torch.finfo(self.dtype), exact.isfinite()
        assert found.shape == exact.shape and found.dtype == self.dtype
        kept = finite | self.special_values_are_kept(found, exact)
        assert kept.all(), (found[~kept], exact[~kept])
        least = info.tiny if self.instruction_set not in NO_DENORMALS else 2 * adversarial.TINY
        allowed = units * info.eps * scale + tail + least
        close = ((found.double() - exact).abs() <= allowed) | self.may_be_nan(found)
        wrong = finite & (scale < info.max / 16) & ~close
        assert not wrong.any(), (found[wrong], exact[wrong], allowed[wrong])


def units_of(*widths: int) -> float:
    return UNITS * sum(1 + width**0.5 / 4 for width in widths)


def linear(x: Tensor, v: Tensor, u: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    return activation_by_formula(x @ v @ u.t() + bias, activation)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        activation: str | None) -> Tensor:
    return activation_by_formula(x @ w1.t() + b1, activation) @ w2.t() + b2


def in_double(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def sizes_of(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double().abs() for t in tensors]


def test_low_rank_linear(instruction_set: str) -> None:
    for _ in range(DRAWS):
        dtype, activation, (rows, k, rank, out) = some(DTYPES), some(ACTIVATIONS), sizes(70, 4)
        tensors = operands([(rows, k), (k, rank), (out, rank), (out,)], dtype, 2)
        Call(instruction_set, dtype, activation, tensors).assert_rule(
            ops.low_rank_linear(*tensors, activation), linear(*in_double(tensors), activation),
            linear(*sizes_of(tensors), None), units_of(k, rank),
            TAILS[dtype] if activation else 0.0)


def test_dense_mlp(instruction_set: str) -> None:
    for _ in range(DRAWS):
        dtype, activation, (rows, k, hidden, out) = some(DTYPES), some(ACTIVATIONS), sizes(70, 4)
        tensors = operands([(rows, k), (hidden, k), (hidden,), (out, hidden), (out,)], dtype, 3)
        tail = TAILS[dtype] * tensors[3].double().abs().sum(-1) if activation else 0.0
        Call(instruction_set, dtype, activation, tensors).assert_rule(
            ops.dense_mlp(*tensors, activation), mlp(*in_double(tensors), activation),
            mlp(*sizes_of(tensors), None), 2 * units_of(k, hidden), tail)


def attention(tensors: list[Tensor], heads: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The op in the dtype of the tensors, and the size of each row's logits."""
    x, wq, wk, wv, wo = tensors
    q, k, v = (reference.split_heads(x @ w.t(), heads) for w in (wq, wk, wv))
    added = mask if mask is None or mask.dtype == torch.bool else mask.to(x.dtype)
    p = reference.probability(q, k, 0.5, added)
    logits = 0.5 * q.abs() @ k.abs().mT
    if added is not None and added.dtype != torch.bool:
        logits = logits + added.abs().where(added > -torch.inf, 0.0)
    return reference.merge_heads(p @ v) @ wo.t(), logits.amax((1, -1))


def test_attention(instruction_set: str) -> None:
    """Where logits have no digits left, the softmax must be that of equal or single logits."""
    for _ in range(DRAWS):
        dtype, heads = some(DTYPES), 1 + chosen(2)
        tokens, width, rank_qk, rank_vo = (max(size, 1) for size in sizes(40, 4))
        shapes = [(2, tokens, width), *(2 * [(heads * rank_qk, width)]),
                  (heads * rank_vo, width), (width, heads * rank_vo)]
        tensors = x, wq, wk, wv, wo = operands(shapes, dtype, 0)
        mask = adversarial.mask(tokens, dtype)
        found = ops.low_rank_attention(x, wq, None, wk, wv, wo, None, heads, 0.5, mask)
        exact, logits = attention(in_double(tensors), heads, mask)
        largest = (x.double().abs() @ wv.double().abs().t()).amax((1, 2), keepdim=True)
        scale = largest.expand(2, tokens, 1) * wo.double().abs().sum(-1)
        lost = units_of(width, rank_qk) * torch.finfo(dtype).eps * logits.unsqueeze(-1)
        tail = scale * torch.expm1((2 * lost).clamp(max=1.0).nan_to_num(1.0))
        Call(instruction_set, dtype, None, tensors).assert_rule(
            found, exact, scale, units_of(width, tokens, rank_vo), tail)


def matrix(dtype: torch.dtype) -> Tensor:
    """A batch of matrices of any rank and size, empty now and then, some graded by columns."""
    count, m, n = 1 + chosen(2), *sizes(70, 2)
    kind = chosen(4)
    if kind == 0:
        a = torch.stack([of_low_rank(some(LOW_RANKS), m, n, dtype) for _ in range(count)])
    else:
        a = adversarial.draw(some(["normal", "constant", "zeros", "outlier"]), (count, m, n), dtype)
    if kind == 1:
        most = 35 if dtype == torch.float32 else 300
        a = a * 10.0 ** (-chosen(most) * torch.rand(n, dtype=dtype))
    return a


def test_decompositions(backend: str) -> None:
    for _ in range(DRAWS // 2):
        a = matrix(some([torch.float32, torch.float64]))
        k = chosen(min(a.shape[1:]) + 1)
        check(a, *decompositions.batched_svd(a, k), factor=4)
        approximation = decompositions.low_rank_approximation(a, k)
        # In 64 bits to about the root of ε.
        check(a, *approximation, factor=4, eps=torch.finfo(torch.float32).eps)
        s = decompositions.singular_values(a)
        torch.testing.assert_close(s, decompositions.batched_svd(a)[1])
        energy = s.double().square().sum().to(a.dtype)
        torch.testing.assert_close(decompositions.truncation_errors(s)[0], energy)
