"""The ops' cases of kernel_cases.py on the CUDA kernels, through `cuda_calls`."""

from typing import Any

import cuda_calls
import torch
from cuda_calls import Runner
from cuda_ptx import Emulated, Moved
from kernel_cases import ARGUMENTS, DTYPES, EPSILON, UNITS, Case, draw, incoming, oracles, worst
from torch import Tensor

from adacomcat.ops import reference


def complaints(runner: Runner, case: Case, dtype: str) -> list[str]:
    """What `worst` says of the result of a case."""
    arguments = [a.contiguous() if isinstance(a, Tensor) else a
                 for a in draw(case, DTYPES[dtype][0])]
    grad = incoming(case, arguments)
    exact, plain = oracles(case, dtype, arguments, grad)
    found = {"out": run(runner, case, arguments, grad)}
    return worst(found, {"out": exact["out"]}, {"out": plain["out"]}, UNITS[dtype])


def run(runner: Runner, case: Case, arguments: list[Any], grad: Tensor) -> Tensor:
    """The op's result, in the shape of x but for its last dimension."""
    named = {name.lower(): value
             for name, value in zip(ARGUMENTS[case.op], arguments, strict=True)}
    if case.sublayer:
        named |= {"epsilon": EPSILON, "residual": grad}
    lead, attention = named["x"].shape[:-1], case.op == "low_rank_attention"
    if not attention:
        for name in ("x", "residual"):
            if named.get(name) is not None:
                named[name] = named[name].reshape(lead.numel(), named[name].shape[-1])
    op = case.op.removeprefix("gated_")
    result = getattr(cuda_calls, op)(runner, **named)
    y = result if isinstance(result, Tensor) else result[0]
    return y.reshape(*lead, y.shape[-1])


def dense_complaints(runner: Runner, sizes: tuple[int, int, int, int], dtype: torch.dtype,
                     name: str, activation: str | None) -> list[str]:
    """The same of a dense MLP with its layer norm and residual; sizes are m, in, hidden, out."""
    m, k, h, n = sizes
    drawn = [torch.randn(m, k), torch.randn(h, k) / max(k, 1) ** 0.5, torch.randn(h),
             torch.randn(n, h) / max(h, 1) ** 0.5, torch.randn(n), torch.randn(m, n)]
    *tensors, residual = (t.to(dtype) for t in drawn)

    def formula(x: Tensor, *weights: Tensor, rest: Tensor) -> dict[str, Tensor]:
        x = torch.nn.functional.layer_norm(x, (k,), eps=EPSILON)
        return {"out": reference.dense_mlp(x, *weights, activation) + rest}

    exact = formula(*(t.double() for t in tensors), rest=residual.double())
    found = cuda_calls.dense_mlp(runner, *tensors, activation, EPSILON, residual)
    return worst({"out": found}, exact, formula(*tensors, rest=residual), UNITS[name])


def deit(tokens: int, d: int, rank: int, heads: int) -> dict[str, list[Tensor]]:
    """The arguments of each op of a DeiT that are tensors, in float16."""
    def e(*size: int) -> Tensor:
        return torch.zeros(*size, dtype=torch.float16)

    qk, vo = 32 * heads, 48 * heads
    return {
        "low_rank_linear": [e(tokens, d), e(d, rank), e(d, rank), e(d)],
        "low_rank_mlp": [e(tokens, d), e(d, rank), e(4 * d, rank), e(4 * d), e(4 * d, rank),
                         e(d, rank), e(d)],
        "low_rank_attention": [e(1, tokens, d), e(qk, d), e(qk), e(qk, d), e(vo, d), e(d, vo),
                               e(d)],
    }


def traffic(op: str, tensors: list[Tensor], architecture: str,
            multiprocessors: int = 132) -> tuple[list[Moved], int]:
    """The launches of an op on the emulator, and the least bytes: each input and output once."""
    launches: list[Moved] = []
    emulated = Emulated(architecture, multiprocessors=multiprocessors, traffic=launches)
    if op == "low_rank_linear":
        y = cuda_calls.low_rank_linear(emulated, *tensors)[0]
    elif op == "low_rank_mlp":
        y = cuda_calls.low_rank_mlp(emulated, *tensors, "relu")[0]
    else:
        y = cuda_calls.low_rank_attention(emulated, *tensors, tensors[1].shape[0] // 32, 0.125)[0]
    return launches, sum(t.numel() * t.element_size() for t in (*tensors, y))
