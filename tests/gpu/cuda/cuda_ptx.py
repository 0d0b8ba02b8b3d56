"""Executes nvcc's PTX of csrc/cuda on the emulator, with the launchers' grid and shared memory."""

import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import cuda_host
import numpy as np
import torch
from cuda_host import ACTIVATIONS, CUDA, Host, memory
from ptx.machine import RED_ZONE, Machine, room
from ptx.parser import Kernel, parse
from torch import Tensor

# How a template's argument is spelled in the name of a kernel.
SPELLED = {torch.float32: "f", torch.float64: "d", torch.float16: "6__half",
           torch.bfloat16: "13__nv_bfloat16"}


def missing() -> str | None:
    """Why nothing can be executed here; None if it can."""
    return cuda_host.missing() or (None if shutil.which("nvcc") else "there is no nvcc")


@cache
def kernel(source: str, architecture: str, name: str) -> Kernel:
    """The kernel of a source file whose name contains `name`."""
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", f"-I{CUDA}", "-ptx"]
    return parse(cuda_host.built(command, CUDA / source, ".ptx").read_text(), name)


@dataclass
class Emulated:
    """An architecture, and a change to make to the kernel."""

    architecture: str
    mutate: Callable[[Kernel], Kernel] = field(default=lambda kernel: kernel)
    # Those that run mutants share one, which keeps what mutants have in common.
    machine: Machine = field(default_factory=lambda: Machine(0))

    def batched_svd(self, a: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `cuda_host.batched_svd`, for matrices whose rotations need no scratch memory."""
        count, m, n = a.shape
        a = a.contiguous()
        u, s, v = a.new_empty(count, m, k), a.new_empty(count, k), a.new_empty(count, n, k)
        status = torch.empty(count, dtype=torch.int32)
        launches: list[tuple[int, int, int]] = []
        cuda_host.batched_svd(Host(launches=launches), a, k)
        device = Device(self.machine, [a, u, s, v, status])
        problem = struct.pack("q iii4x q qqq qqqqq", count, m, n, k, device.at[0], *a.stride(),
                              *device.at[1:], 0)
        small = int(min(m, n) <= 32)
        matrix = launches[0][2] // (launches[0][1] // 32 if small else 1)  # bytes of one
        name = f"batched_svd_kernelI{SPELLED[a.dtype]}Lb{small}ELb0EE"
        self._run("batched_svd.cu", name, launches[0], [problem, matrix], device)
        return u, s, v, status

    def truncation_errors(self, s: Tensor) -> Tensor:
        """As `cuda_host.truncation_errors`."""
        errors = s.new_empty(s.shape[0], s.shape[2] + 1)
        launches: list[tuple[int, int, int]] = []
        cuda_host.truncation_errors(Host(launches=launches), s)
        device = Device(self.machine, [s, errors])
        self._run("truncation_errors.cu", f"truncation_errors_kernelI{SPELLED[s.dtype]}E",
                  launches[0], [*device.at, *s.shape], device)
        return errors

    def low_rank_linear(self, rows: int, x: Tensor, v: Tensor, u: Tensor,
                        bias: Tensor | None = None, activation: str | None = None,
                        residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `cuda_host.low_rank_linear` with keep_intermediates, for tiles of `rows` rows."""
        (m, k), r, n = x.shape, v.shape[1], u.shape[0]
        y, middle = x.new_empty(m, n), x.new_empty(m, r)
        launches: list[tuple[int, int, int]] = []
        host = Host(launches=launches, sources=cuda_host.tile_of(rows))
        cuda_host.low_rank_linear(
            host, x, v, u, bias, activation, residual, keep_intermediates=True)
        strided = [x, v, u, *([] if residual is None else [residual])]
        spans = [memory(t) for t in strided]
        device = Device(self.machine, [*spans, *([] if bias is None else [bias]), y, middle])
        matrices = [number for t, at in zip(strided, device.at, strict=False)
                    for number in (at, t.stride(0))]
        matrices += [0] * (8 - len(matrices))
        problem = struct.pack("q iii4x qqqqqqqq qqq i4x", m, k, r, n, *matrices,
                              0 if bias is None else device.at[len(strided)], *device.at[-2:],
                              ACTIVATIONS.index(activation))
        name = f"low_rank_linear_kernelI{SPELLED[x.dtype]}Li{rows}EE"
        self._run("low_rank_linear.cu", name, launches[0], [problem], device)
        return y, middle

    def _run(self, source: str, name: str, launch: tuple[int, int, int], arguments: list,
             device: "Device") -> None:
        blocks, threads, shared = launch
        code = self.mutate(kernel(source, self.architecture, name))
        device.machine.launch(code, (blocks,), threads, arguments, shared)
        device.fetch()


class Device:
    """Dense tensors on an emulated machine."""

    def __init__(self, machine: Machine, tensors: list[Tensor]) -> None:
        nothing = np.empty(0, np.uint8)
        self.bytes = [t.view(torch.uint8).numpy().reshape(-1) if t.numel() else nothing
                      for t in tensors]
        self.machine = machine
        machine.empty(RED_ZONE + sum(room(b.size) for b in self.bytes))
        self.at = [self.machine.put(b) for b in self.bytes]

    def fetch(self) -> None:
        for at, data in zip(self.at, self.bytes, strict=True):
            data[:] = self.machine.get(at, data.size)
