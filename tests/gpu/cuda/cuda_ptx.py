"""Executes nvcc's PTX of csrc/cuda on the emulator, as the launchers launch it."""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import cuda_host
import numpy as np
from cuda_host import CUDA, KERNELS, Announced, Host, from_bytes, to_bytes
from ptx.machine import RED_ZONE, Machine, room
from ptx.memory import SECTOR, Traffic
from ptx.parser import Kernel, parse, search
from torch import Tensor

# "low_rank_linear_kernelI6__halfLi16EE" of a mangled name: stem and template's arguments.
_NAME = re.compile(r"\d((?:[a-z]+_)+kernel)(I.*?E)Ev")


def missing() -> str | None:
    """Why nothing can be executed here; None if it can."""
    return cuda_host.missing() or (None if shutil.which("nvcc") else "there is no nvcc")


@cache
def kernel(symbol: str, architecture: str) -> Kernel:
    """The kernel with a mangled name, of whichever source has it."""
    stem, arguments = search(_NAME, symbol).groups()
    source = next(CUDA / name for name in KERNELS if f" {stem}(" in (CUDA / name).read_text())
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", f"-I{CUDA}", "-ptx"]
    return parse(cuda_host.built(command, source, ".ptx").read_text(), stem + arguments)


@dataclass
class Emulated:
    """An architecture, a number of multiprocessors, and a change to make to the kernels."""

    architecture: str
    mutate: Callable[[Kernel], Kernel] = field(default=lambda kernel: kernel)
    # Those that run mutants share one, which keeps what mutants have in common.
    machine: Machine = field(default_factory=lambda: Machine(0))
    multiprocessors: int = 132
    # Where it is a list, `run` appends the traffic of each launch.
    traffic: list["Moved"] | None = None

    def run(self, op: str, numbers: Sequence[float], inputs: Sequence[Tensor],
            outputs: Sequence[Tensor]) -> None:
        """As `Host.run`."""
        said = Host("quick", multiprocessors=self.multiprocessors).announce(op, numbers, inputs)
        data = [np.frombuffer(to_bytes(t), np.uint8) for t in inputs]
        data += [np.full(size, 0xFF, np.uint8) for _, size in said.arrays[len(inputs):]]
        size = RED_ZONE + sum(room(part.size) for part in data)
        self.machine.empty(size)
        at = [self.machine.put(part) for part in data]
        for launch in said.launches:
            code = self.mutate(kernel(launch.symbol, self.architecture))
            arguments = [moved(parameter, said, at) for parameter in launch.parameters]
            if self.traffic is not None:
                self.machine.traffic = Traffic(size)
                self.traffic.append(Moved(code.name, launch.blocks, self.machine.traffic,
                                          list(self.machine.buffers)))
            self.machine.launch(code, (launch.blocks,), launch.threads, arguments, launch.shared)
        for output, address in zip(outputs, at[len(inputs):], strict=False):
            size = output.numel() * output.element_size()
            output.copy_(from_bytes(self.machine.get(address, size).tobytes(), output))


@dataclass(frozen=True)
class Moved:
    """The traffic of one launch; `buffers` are where arrays begin."""

    kernel: str
    blocks: int
    counts: Traffic
    buffers: list[int]

    def requested(self) -> int:
        """Bytes of the sectors that warps ask for."""
        return SECTOR * sum(self.counts.requested.values())

    def touched(self) -> Counter[int]:
        """Bytes of the sectors that are loaded or stored, by array."""
        found: Counter[int] = Counter()
        for sectors in self.counts.touched.values():
            at = np.searchsorted(self.buffers, np.flatnonzero(sectors) * SECTOR, "right") - 1
            for array, count in zip(*np.unique(at, return_counts=True), strict=True):
                found[int(array)] += SECTOR * int(count)
        return found


def outside(launches: Sequence[Moved]) -> int:
    """Bytes of arrays that one launch alone touches; the others are workspace between launches."""
    each = [launch.touched() for launch in launches]
    return sum(count for one in each for array, count in one.items()
               if sum(array in other for other in each) == 1)


def moved(parameter: bytes, said: Announced, at: Sequence[int]) -> bytes:
    """The parameter with addresses of the machine in the place of pointers to the host's arrays."""
    if len(parameter) % 8:
        return parameter
    words = np.frombuffer(parameter, np.uint64).copy()
    for i, word in enumerate(words.tolist()):
        for (start, size), address in zip(said.arrays, at, strict=True):
            if start <= word < start + max(size, 1):
                words[i] = address + word - start
    return words.tobytes()
