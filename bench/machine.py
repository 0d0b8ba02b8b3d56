"""The machine and versions of a measurement, and the rate of the fastest gemm on this machine."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from adacomcat import ops
from adacomcat.ops import backends


def machine() -> dict[str, object]:
    """CPU, versions, and the build of the C++ extension."""
    info = Path("/proc/cpuinfo")
    model = platform.processor()
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {"cpu": model, "torch": torch.__version__, "timm": timm.__version__,
            "extension": backends.build_info()}


def fastest(run: Callable[[], object], repeats: int = 8) -> float:
    """Seconds of the fastest of ``repeats`` calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def gemm_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest large gemm here: PyTorch's, or that of ``ops.low_rank_linear``."""
    rates = []
    with torch.inference_mode():
        for size in (512, 1024):
            a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
            flops = 2 * size**3
            rates.append(flops / fastest(lambda a=a, b=b: F.linear(a, b)))
            rates.append(2 * flops / fastest(lambda a=a, b=b: ops.low_rank_linear(a, b, b)))
    return max(rates) / 1e9
