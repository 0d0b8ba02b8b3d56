"""Time of every op by backend, shape and dtype, forward and backward.

`extra_info` carries GFLOP/s, their fraction of the fastest product measured here, and versions.
``plain`` is what a user would write with the library's own products.

python -m pytest bench/test_ops.py --benchmark-group-by=param:name,param:shape,param:dtype

``python bench/test_ops.py`` prints how many times ours is faster than plain, of interleaved runs.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from machine import gemm_peak, machine
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adacomcat import ops
from adacomcat.latency.timing import interleaved
from adacomcat.ops import backends, inference, reference
from adacomcat.report.tables import print_table

# DeiT-S at batch 1, 8 and 16 (3,152 tokens): 384 channels, 6 heads.
TOKENS, CHANNELS = 197, 384
BATCHES = {"b1": 1, "b8": 8, "b16": 16}
BACKENDS = ["plain", *backends.available()]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Problem(NamedTuple):
    """An op, the same in plain PyTorch, and what both take after x, for each image of ``shape``."""

    op: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    weights: list[Tensor]
    options: tuple
    shape: tuple[int, ...] = (TOKENS, CHANNELS)
    trains: bool = True

    def tensors(self, batch: int, dtype: torch.dtype) -> list[Tensor]:
        return [t.to(dtype) for t in (torch.randn(batch, *self.shape), *self.weights)]


def weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) / columns**0.5


def linear(width: int, rank: int, out: int, activation: str | None = None) -> Problem:
    def plain(x: Tensor, v: Tensor, u: Tensor, bias: Tensor, activation: str | None) -> Tensor:
        return reference.activate(F.linear(F.linear(x, v.t()), u, bias), activation)

    # Vᵀ contiguous: the layout that F.linear likes, for both.
    return Problem(ops.low_rank_linear, plain,
                   [weight(rank, width).t(), weight(out, rank), torch.randn(out)],
                   (activation,), (TOKENS, width))


def mlp() -> Problem:
    def plain(x, v1, u1, b1, v2, u2, b2, activation) -> Tensor:
        hidden = reference.activate(F.linear(F.linear(x, v1.t()), u1, b1), activation)
        return F.linear(F.linear(hidden, v2.t()), u2, b2)

    return Problem(ops.low_rank_mlp, plain,
                   [weight(128, 384).t(), weight(1536, 128), torch.randn(1536),
                    weight(128, 1536).t(), weight(384, 128), torch.randn(384)], ("gelu",))


def dense_mlp(hidden: int) -> Problem:
    def plain(x, w1, b1, w2, b2, activation) -> Tensor:
        return F.linear(reference.activate(F.linear(x, w1, b1), activation), w2, b2)

    return Problem(ops.dense_mlp, plain, [weight(hidden, 384), torch.randn(hidden),
                                          weight(384, hidden), torch.randn(384)], ("gelu",))


def attention(rank_qk: int, rank_vo: int) -> Problem:
    def plain(x, wq, bq, wk, wv, wo, bo, heads, scale) -> Tensor:
        q, k, v = (F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for w, b in ((wq, bq), (wk, None), (wv, None)))
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return F.linear(y.transpose(1, 2).flatten(2), wo, bo)

    qk, vo = 6 * rank_qk, 6 * rank_vo
    return Problem(ops.low_rank_attention, plain,
                   [weight(qk, 384), torch.randn(qk), weight(qk, 384), weight(vo, 384),
                    weight(384, vo), torch.randn(384)], (6, 64**-0.5))


def class_attention() -> Problem:
    def plain(x, wq, bq, wk, wv, wo, bo, heads, scale, epsilon) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=epsilon)
        q, k, v = (F.linear(t, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for t, w, b in ((normed[:, :1], wq, bq), (normed, wk, None), (normed, wv, None)))
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return x[:, :1] + F.linear(y.transpose(1, 2).flatten(2), wo, bo)

    return Problem(inference.class_attention, plain,
                   [weight(192, 384), torch.randn(192), weight(192, 384), weight(192, 384),
                    weight(384, 192), torch.randn(384)], (6, 64**-0.5, 1e-6), trains=False)


def rotary() -> Problem:
    angle = torch.randn(196, 32).repeat(1, 2)

    def rotary_attention(x, wq, bq, wk, bk, wv, wo, bo, sin, cos, heads, scale) -> Tensor:
        return inference.rotary_attention(x, None, wq, bq, None, wk, bk, wv, wo, bo, heads, scale,
                                          sin, cos, True)

    def plain(x, wq, bq, wk, bk, wv, wo, bo, sin, cos, heads, scale) -> Tensor:
        q, k, v = (F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for w, b in ((wq, bq), (wk, bk), (wv, None)))
        q, k = (reference.rotate(t, sin, cos, True) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return F.linear(y.transpose(1, 2).flatten(2), wo, bo)

    return Problem(rotary_attention, plain,
                   [weight(384, 384), torch.randn(384), weight(384, 384), torch.randn(384),
                    weight(192, 384), weight(384, 192), torch.randn(384), angle.sin(),
                    angle.cos()], (6, 64**-0.5), trains=False)


def gated() -> Problem:
    def gated_mlp(x, wg, bg, w1, b1, w2, b2) -> Tensor:
        return inference.gated_mlp(x, None, wg, bg, w1, b1, None, w2, b2, "silu")

    def plain(x, wg, bg, w1, b1, w2, b2) -> Tensor:
        return F.linear(F.silu(F.linear(x, wg, bg)) * F.linear(x, w1, b1), w2, b2)

    return Problem(gated_mlp, plain,
                   [weight(512, 384), torch.randn(512), weight(512, 384), torch.randn(512),
                    weight(384, 512), torch.randn(384)], (), trains=False)


def head() -> Problem:
    return Problem(inference.linear, F.linear, [weight(1000, 384), torch.randn(1000)], (),
                   (384,), trains=False)


def patches() -> Problem:
    def plain(image, w, bias, prefix, positions) -> Tensor:
        tokens = F.conv2d(image, w, bias, stride=16).flatten(2).mT + positions
        return torch.cat([prefix.expand(len(image), -1, -1), tokens], 1)

    return Problem(inference.patch_embedding, plain,
                   [weight(384, 768).unflatten(1, (3, 16, 16)), torch.randn(384),
                    torch.randn(1, 384), torch.randn(196, 384)], (), (3, 224, 224), trains=False)


OPS: dict[str, Callable[[], Problem]] = {
    "low_rank_linear": lambda: linear(384, 128, 1536),
    "low_rank_linear_gelu": lambda: linear(384, 128, 1536, "gelu"),
    "low_rank_linear_down": lambda: linear(1536, 128, 384),
    "low_rank_linear_square": lambda: linear(384, 64, 384),
    "low_rank_mlp": mlp,
    "dense_mlp": lambda: dense_mlp(1536),
    "dense_mlp_half": lambda: dense_mlp(768),
    "low_rank_attention": lambda: attention(32, 32),
    "low_rank_attention_unequal": lambda: attention(24, 40),
    "rotary_attention": rotary,
    "gated_mlp": gated,
    "class_attention": class_attention,
    "linear": head,
    "patch_embedding": patches,
}


@cache
def peak(dtype: torch.dtype, threads: int) -> float:
    return gemm_peak(dtype)


def skip_where_it_cannot_run(backend: str, op: str, dtype: torch.dtype) -> None:
    if backend == "plain":
        return
    reason = backends.available()[backend]
    if reason is None:
        device = "cuda" if backend in ("triton", "cuda") else "cpu"
        reason = backends.refusal(backend, op, torch.empty(0, device=device, dtype=dtype))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("name", OPS)
def test_op(benchmark: Callable, name: str, shape: str, dtype: str, backend: str,
            direction: str) -> None:
    torch.manual_seed(0)
    problem = OPS[name]()
    op, options = problem.op, problem.options
    skip_where_it_cannot_run(backend, op.__name__, DTYPES[dtype])
    device = "cuda" if backend in ("triton", "cuda") else "cpu"
    tensors = [t.to(device) for t in problem.tensors(BATCHES[shape], DTYPES[dtype])]
    train = direction == "backward"
    if train and not problem.trains:
        pytest.skip("for inference only")
    for tensor in tensors:
        tensor.requires_grad_(train)
    function = problem.plain if backend == "plain" else op

    def run() -> None:
        with torch.set_grad_enabled(train):
            y = function(*tensors, *options)
            if train:
                y.backward(y.detach())
        if device == "cuda":
            torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        op(*tensors, *options)
    if backend == "plain":
        benchmark(run)
    else:
        with backends.use_backend(backend):
            benchmark(run)
    flops = counter.get_total_flops() * (3 if train else 1)
    gflops = flops / benchmark.stats["median"] / 1e9
    fastest = peak(DTYPES[dtype], torch.get_num_threads()) if device == "cpu" else float("nan")
    benchmark.extra_info.update(
        machine(), gflops=round(gflops, 1), threads=torch.get_num_threads(),
        fraction_of_peak=round(gflops / fastest, 3),
        bytes=sum(t.numel() * t.element_size() for t in (tensors[0], *tensors)))


def ratio(name: str, batch: int, dtype: torch.dtype, seconds: float) -> float:
    """Time of plain PyTorch over ours, medians of alternating runs, forward."""
    torch.manual_seed(0)
    problem = OPS[name]()
    tensors = problem.tensors(batch, dtype)
    ms = interleaved({run: lambda run=run: run(*tensors, *problem.options)
                      for run in (problem.op, problem.plain)}, 10_000, seconds)
    return ms[problem.plain] / ms[problem.op]


def rows(names: Sequence[str], threads: Sequence[int], seconds: float) -> list[list[str]]:
    found: dict[str, list[str]] = {name: [] for name in names}
    for count, dtype in product(threads, DTYPES.values()):
        torch.set_num_threads(count)
        for name, batch in product(names, BATCHES.values()):
            found[name].append(f"{ratio(name, batch, dtype, seconds):.2f}")
    return [[name, *ratios] for name, ratios in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--names", nargs="+", choices=OPS, default=list(OPS), metavar="OP")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each comparison")
    args = parser.parse_args()
    columns = ["", *(f"{dtype} {batch}, {count} threads" for count, dtype, batch
                     in product(args.threads, DTYPES, BATCHES))]
    print_table("Plain PyTorch's time over ours", columns,
                rows(args.names, args.threads, args.seconds))


if __name__ == "__main__":
    main()
