"""The kernels of csrc/cuda as functions of CPU tensors; a `Host` or an `Emulated` runs them."""

from collections.abc import Sequence
from typing import Protocol

import torch
from cuda_host import Host
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu", "relu", "quick_gelu")
NO_NORM = -1.0


class Runner(Protocol):
    """What runs the kernels of an op on `inputs` and fills `outputs`."""

    def run(self, op: str, numbers: Sequence[float], inputs: Sequence[Tensor],
            outputs: Sequence[Tensor]) -> None: ...


def needs_scratch(a: Tensor, available: int) -> bool:
    """Whether a matrix and its rotations together exceed the shared memory."""
    answer = torch.empty(1, dtype=torch.int32)
    Host().run("svd_needs_scratch", [a.element_size(), *a.shape[-2:], available], [], [answer])
    return bool(answer)


def batched_svd(runner: Runner, a: Tensor, k: int,
                available: int = 227 * 1024) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, s, v and the status of each matrix of a (count, m, n), whatever its strides."""
    count, m, n = a.shape
    flat = a.as_strided((a.untyped_storage().nbytes() // a.element_size(),), (1,), 0)
    assert a.storage_offset() == 0
    u, s, v = a.new_empty(count, m, k), a.new_empty(count, k), a.new_empty(count, n, k)
    status = torch.empty(count, dtype=torch.int32)
    numbers = [a.element_size(), count, m, n, k, *a.stride(), flat.numel(), available]
    runner.run("batched_svd", numbers, [flat], [u, s, v, status])
    return u, s, v, status


def truncation_errors(runner: Runner, s: Tensor) -> Tensor:
    """errors (count, ranks + 1) of s (count, heads, ranks)."""
    errors = s.new_empty(s.shape[0], s.shape[2] + 1)
    runner.run("truncation_errors", [s.element_size(), *s.shape], [s], [errors])
    return errors


def low_rank_linear(runner: Runner, x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None,
                    activation: str | None = None, residual: Tensor | None = None,
                    keep_intermediates: bool = False, gate: Tensor | None = None,
                    epsilon: float | None = None) -> tuple[Tensor, Tensor]:
    """y and x V; the rows of x (m, in), V, U and the residual (m, out) may lie apart."""
    (m, k), r, n = x.shape, v.shape[1], u.shape[0]
    y, middle = x.new_empty(m, n), x.new_empty((m, r) if keep_intermediates else (0,))
    _run(runner, "low_rank_linear",
         [TYPES[x.dtype], m, k, r, n, ACTIVATIONS.index(activation), keep_intermediates,
          _number(epsilon)],
         [x, v, u, residual], [x, v, gate, u, bias, residual], [y, middle])
    return y, middle


def low_rank_mlp(runner: Runner, x: Tensor, v1: Tensor, u1: Tensor, b1: Tensor | None, v2: Tensor,
                 u2: Tensor, b2: Tensor | None, activation: str | None,
                 keep_intermediates: bool = False, epsilon: float | None = None,
                 residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y, x V1 and h V2; the rows of x (m, in), of the factors and of the residual may lie apart."""
    (m, k), (h, r1), (n, r2) = x.shape, u1.shape, u2.shape
    kept = [x.new_empty((m, r) if keep_intermediates else (0,)) for r in (r1, r2)]
    y = x.new_empty(m, n)
    _run(runner, "low_rank_mlp",
         [TYPES[x.dtype], m, k, r1, h, r2, n, ACTIVATIONS.index(activation), keep_intermediates,
          _number(epsilon)],
         [x, v1, u1, v2, u2, residual], [x, v1, u1, b1, v2, u2, b2, residual], [y, *kept])
    return y, kept[0], kept[1]


def dense_mlp(runner: Runner, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor,
              b2: Tensor | None, activation: str | None, epsilon: float | None = None,
              residual: Tensor | None = None) -> Tensor:
    """y; the rows of x (m, in), of the weights and of the residual may lie apart."""
    (m, k), h, n = x.shape, w1.shape[0], w2.shape[0]
    y = x.new_empty(m, n)
    _run(runner, "dense_mlp",
         [TYPES[x.dtype], m, k, h, n, ACTIVATIONS.index(activation), _number(epsilon)],
         [x, w1, w2, residual], [x, w1, b1, w2, b2, residual], [y])
    return y


def low_rank_attention(runner: Runner, x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor,
                       wv: Tensor, wo: Tensor, bo: Tensor | None, num_heads: int, scale: float,
                       attn_mask: Tensor | None = None, epsilon: float | None = None,
                       residual: Tensor | None = None) -> tuple[Tensor, ...]:
    """y, q, k, v and the context of x (batch, tokens, in)."""
    batch, tokens, k = x.shape
    qk, vo, n = wq.shape[0], wv.shape[0], wo.shape[0]
    results = [x.new_empty(batch, tokens, width) for width in (n, qk, qk, vo, vo)]
    flat, rest = x.flatten(0, 1), None if residual is None else residual.flatten(0, 1)
    mask, kind, strides = None, 0, (0, 0, 0, 0)
    if attn_mask is not None:
        mask, kind = attn_mask.contiguous(), 1 if attn_mask.dtype == torch.bool else 2
        strides = mask.expand(batch, num_heads, tokens, tokens).stride()
    _run(runner, "low_rank_attention",
         [TYPES[x.dtype], batch, tokens, k, num_heads, qk // num_heads, vo // num_heads, n,
          float(scale), _number(epsilon), kind, *strides],
         [flat, wq, wk, wv, wo, rest], [flat, wq, bq, wk, wv, wo, bo, mask, rest], results)
    return tuple(results)


def _number(epsilon: float | None) -> float:
    return NO_NORM if epsilon is None else float(epsilon)


def _run(runner: Runner, op: str, numbers: Sequence[float], strided: Sequence[Tensor | None],
         inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
    """With the strides of the rows of matrices and the bytes of all inputs; None is absent."""
    spans = [torch.empty(0) if t is None else memory(t) if t.dim() == 2 else t.flatten()
             for t in inputs]
    strides = [0 if t is None else t.stride(0) for t in strided]
    runner.run(op, [*numbers, *strides, *(t.numel() * t.element_size() for t in spans)], spans,
               outputs)


def memory(t: Tensor) -> Tensor:
    """The memory that a matrix with dense rows spans, as a vector."""
    if t.numel() == 0:
        return t.new_empty(0)
    return t.as_strided(((t.shape[0] - 1) * t.stride(0) + t.shape[1],), (1,))
