"""What a measurement stands on: the machine, the versions, and the fastest product found here."""

import platform
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from adacomcat import ops
from adacomcat.ops import backends


def machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo")
    model = platform.processor()
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {"cpu": model, "torch": torch.__version__, "timm": timm.__version__,
            "extension": backends.build_info()}


def fastest(run: object, repeats: int = 8) -> float:
    """Seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def gemm_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest large product here, be it the library's or our own kernel's."""
    rates = []
    with torch.inference_mode():
        for size in (512, 1024):
            a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
            product = 2 * size**3
            rates.append(product / fastest(lambda a=a, b=b: F.linear(a, b)))
            rates.append(2 * product / fastest(lambda a=a, b=b: ops.low_rank_linear(a, b, b)))
    return max(rates) / 1e9
