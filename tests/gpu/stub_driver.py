"""A Triton driver for machines without a GPU: kernels can be compiled for any architecture."""

from collections.abc import Iterator
from contextlib import contextmanager

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


class StubDriver:
    """Answers what Triton asks before it compiles or interprets a kernel; launches nothing."""

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


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Triton believes that the device is one of TARGETS."""
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(StubDriver(TARGETS[name]))
    try:
        yield
    finally:
        driver.set_active(before)


@contextmanager
def without_machine_code() -> Iterator[None]:
    """NVIDIA's kernels are compiled as far as PTX; what ptxas makes of it takes longest."""

    def leave_out(*arguments: object) -> tuple[str, str]:
        if arguments:
            _, stages, *_ = arguments
            stages["cubin"] = lambda ptx, metadata: b""
        return "without machine code", ""  # part of the key of Triton's cache

    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = leave_out
        yield
