"""A Triton driver for machines without a GPU: kernels can be compiled for any architecture."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Tests compile nothing for these; tools ask for the tiles that they get.
UNCOMPILED = {"sm_86": GPUTarget("cuda", 86, 32), "sm_120": GPUTarget("cuda", 120, 32)}


class StubDriver:
    """Answers Triton's queries before it compiles or interprets a kernel; it launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _without_machine_code(*arguments: Any) -> tuple[str, str]:
    """Triton's hook for compile stages: it skips ptxas, and adds to the cache key.

    Triton calls it without arguments for the key alone.
    """
    if arguments:
        _, stages, *_ = arguments
        if "cubin" in stages:
            stages["cubin"] = lambda ptx, metadata: b""
    return "without machine code", ""


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Let Triton compile for one of the targets: to PTX for NVIDIA, to machine code for AMD.

    `tools/gpu_resources.py` calls ptxas itself.
    """
    driver: Any = triton.runtime.driver
    before = driver._active
    driver.set_active(StubDriver({**TARGETS, **UNCOMPILED}[name]))
    try:
        with knobs.runtime.scope():
            hooks: Any = knobs.runtime
            hooks.add_stages_inspection_hook = _without_machine_code
            yield
    finally:
        driver.set_active(before)
