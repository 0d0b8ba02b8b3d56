"""Time of every op by backend and shape; `extra_info` carries the GFLOP/s.

python -m pytest bench/test_ops.py --benchmark-group-by=param:shape
"""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adacomcat import backends, ops

# DeiT-S at batch 1 and 8: 197 tokens, 384 channels, 6 heads.
BATCHES = {"b1": 1, "b8": 8}
BACKENDS = list(backends.available())


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) / columns**0.5


def linear(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    v, u, bias = weight(384, 128), weight(1536, 128), torch.randn(1536)
    return lambda: ops.low_rank_linear(x, v, u, bias)


def linear_gelu(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    v, u, bias = weight(384, 128), weight(1536, 128), torch.randn(1536)
    return lambda: ops.low_rank_linear(x, v, u, bias, activation="gelu")


def gated(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    v, gate, u = weight(384, 128), torch.rand(128), weight(1536, 128)
    return lambda: ops.gated_low_rank_linear(x, v, gate, u)


def mlp(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    factors = weight(384, 128), weight(1536, 128), torch.randn(1536), weight(1536, 128)
    u2, b2 = weight(384, 128), torch.randn(384)
    return lambda: ops.low_rank_mlp(x, *factors, u2, b2, "gelu")


def attention(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    wq, bq, wk, wv = weight(192, 384), torch.randn(192), weight(192, 384), weight(288, 384)
    wo, bo = weight(384, 288), torch.randn(384)
    return lambda: ops.low_rank_attention(x, wq, bq, wk, wv, wo, bo, 6, 64**-0.5)


OPS = {
    "low_rank_linear": linear,
    "low_rank_linear_gelu": linear_gelu,
    "gated_low_rank_linear": gated,
    "low_rank_mlp": mlp,
    "low_rank_attention": attention,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_op(benchmark: Callable, name: str, shape: str, backend: str) -> None:
    torch.manual_seed(0)
    device = "cuda" if backend in ("triton", "cuda") else "cpu"
    reason = backends.available()[backend]
    if reason is None:
        empty = torch.empty(0, device=device)
        reason = backends.refusal(backend, name.removesuffix("_gelu"), empty)
    if reason is not None:
        pytest.skip(reason)
    with torch.device(device), backends.use_backend(backend):
        run = OPS[name](torch.randn(BATCHES[shape], 197, 384))
        with FlopCounterMode(display=False) as counter:
            run()
        benchmark(run)
    flops = counter.get_total_flops()
    benchmark.extra_info["gflops"] = round(flops / benchmark.stats["median"] / 1e9, 1)
    benchmark.extra_info["threads"] = torch.get_num_threads()
