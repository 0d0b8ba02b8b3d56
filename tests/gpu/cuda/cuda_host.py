"""csrc/cuda as host C++: builds with the shim, and runs of its kernels on CPU tensors.

Each call runs in a process of its own, so that a fault, a deadlock or a sanitizer ends only that.
`cuda_calls.py` has the kernels as functions.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[3]
SHIM = Path(__file__).parent / "shim"
CUDA = ROOT / "csrc" / "cuda"
COMMON = ROOT / "csrc" / "common"
# The files that each op of the driver needs.
SOURCES = {
    "batched_svd": ("batched_svd.cu",),
    "svd_needs_scratch": ("batched_svd.cu",),
    "truncation_errors": ("truncation_errors.cu",),
    "low_rank_linear": ("low_rank_linear.cu",),
    "low_rank_mlp": ("low_rank_mlp.cu", "low_rank_linear.cu"),
    "dense_mlp": ("dense_mlp.cu", "project.cu"),
    "low_rank_attention": ("low_rank_attention.cu", "project.cu"),
}
KERNELS = tuple(dict.fromkeys(name for names in SOURCES.values() for name in names))
# Compiler flags of the kernels and defines of the shim.
MODES = {
    "plain": (["-O2"], []),
    "quick": (["-O1"], []),  # compiles quickly
    "asan": (["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr",
              "-fno-sanitize-recover=undefined"], ["-DSHIM_ASAN"]),
    "tsan": (["-O1", "-g1", "-fsanitize=thread"], ["-DSHIM_TSAN"]),
}
CACHE = Path(tempfile.gettempdir()) / f"adacomcat-cuda-shim-{os.getuid()}"


def missing() -> str | None:
    """Why the shim cannot be built here; None if it can."""
    if platform.machine() != "x86_64":
        return "the shim switches stacks in x86-64 assembly"
    return None if shutil.which("g++") else "the shim needs g++"


class Failed(AssertionError):
    """The process ended with an error; the message has its output."""


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, whose parameters are bytes; `symbol` is its name in the executable."""

    blocks: int
    threads: int
    shared: int
    symbol: str
    parameters: list[bytes]


@dataclass(frozen=True)
class Announced:
    """What a run has said: its launches, and (address, bytes) of inputs, outputs and scratch."""

    launches: list[Launch]
    arrays: list[tuple[int, int]]


@dataclass(frozen=True)
class Host:
    """A build with its mode and replaced sources (by file name), and a seed of the warps' order.

    The number of multiprocessors decides about tiles and the number of blocks.
    """

    mode: str = "plain"
    sources: dict[str, str] = field(default_factory=dict, hash=False)
    seed: int = 0
    multiprocessors: int = 132
    # `run` appends what it has launched.
    launches: list[Launch] = field(default_factory=list, hash=False)

    def run(self, op: str, numbers: Sequence[float], inputs: Sequence[Tensor],
            outputs: Sequence[Tensor]) -> None:
        """Run the kernels of an op on `inputs` and fill `outputs`."""
        done = self._process(op, numbers, inputs, {"SHIM_SEED": str(self.seed)})
        self.launches.extend(self._read(op, done.stderr).launches)
        at = 0
        for output in outputs:
            size = output.numel() * output.element_size()
            output.copy_(from_bytes(done.stdout[at : at + size], output))
            at += size
        assert at == len(done.stdout)

    def announce(self, op: str, numbers: Sequence[float], inputs: Sequence[Tensor]) -> Announced:
        """What `run` would launch; no kernel runs."""
        done = self._process(op, numbers, inputs, {"SHIM_ANNOUNCE_ONLY": "1"})
        return self._read(op, done.stderr)

    def _process(self, op: str, numbers: Sequence[float], inputs: Sequence[Tensor],
                 environment: dict[str, str]) -> subprocess.CompletedProcess:
        arguments = (repr(n) if isinstance(n, float) else str(int(n)) for n in numbers)
        environment = {**os.environ, "TSAN_OPTIONS": "exitcode=66",
                       "ASAN_OPTIONS": "detect_leaks=0",
                       "SHIM_MULTIPROCESSORS": str(self.multiprocessors), **environment}
        try:
            done = subprocess.run([str(self.executable(op)), op, *arguments],
                                  input=b"".join(map(to_bytes, inputs)), capture_output=True,
                                  env=environment, timeout=300)
        except subprocess.TimeoutExpired:
            raise Failed(f"{op} does not end") from None
        if done.returncode:
            said = "\n".join(line[:1000] for line in done.stderr.decode().splitlines()
                             if not line.startswith(("launch ", "array ")))
            raise Failed(f"{op}, exit code {done.returncode}: {said[-4000:]}")
        return done

    def _read(self, op: str, said: bytes) -> Announced:
        launches, arrays, names = [], [], symbols(self.executable(op))
        for line in said.decode().splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "array":
                address, size = rest.split()
                arrays.append((int(address, 16), int(size)))
            elif kind == "launch":
                blocks, threads, shared, place, *parameters = rest.split()
                launches.append(Launch(int(blocks), int(threads), int(shared), names[int(place)],
                                       [bytes.fromhex(one) for one in parameters]))
        return Announced(launches, arrays)

    def executable(self, op: str) -> Path:
        """The driver with the kernels of one op, linked from cached objects."""
        flags, defines = MODES[self.mode]
        common = ["g++", "-std=c++17", f"-I{SHIM}", f"-I{CUDA}"]
        objects = [
            built([*common, "-O2", *defines, "-c"], SHIM / "shim.cpp", ".o"),
            built([*common, *flags, "-c"], SHIM / "driver.cpp", ".o"),
            *(built([*common, *flags, "-x", "c++", "-c"], CUDA / name, ".o", self.sources)
              for name in SOURCES[op]),
        ]
        # The driver calls the kernels of all ops, of which the others are not there.
        return _linked(["g++", *flags, "-no-pie", "-Wl,--unresolved-symbols=ignore-all"], objects)


@cache
def symbols(executable: Path) -> dict[int, str]:
    """Where each kernel lies in the executable → its mangled name."""
    listed = subprocess.run(["nm", str(executable)], capture_output=True, text=True, check=True)
    found = (line.split() for line in listed.stdout.splitlines() if "_kernelI" in line)
    return {int(fields[0], 16): fields[-1] for fields in found if len(fields) == 3}


def replaced(name: str, old: str, new: str) -> dict[str, str]:
    """The sources of a build in which one file of csrc/cuda has `new` instead of `old`."""
    source = (CUDA / name).read_text()
    if source.count(old) != 1:
        raise ValueError(f"{name} has {source.count(old)} times: {old}")
    return {name: source.replace(old, new)}


def to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def from_bytes(data: bytes, like: Tensor) -> Tensor:
    if not data:
        return torch.empty_like(like)
    return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape)


def built(command: list[str], source: Path, suffix: str,
          replacing: dict[str, str] | None = None) -> Path:
    """The compiler's output for `source`, cached by content; `replacing` has changed sources."""
    replacing = replacing or {}
    text = replacing.get(source.name, source.read_text())
    headers = {path.name: replacing.get(path.name, path.read_text()) for path in included(text)}
    # All headers lie beside the source if one is replaced, since each is looked for there first.
    beside = headers if replacing.keys() & headers.keys() else {}
    content = [*command, source.name, text]
    content += [f"{name}\0{headers[name]}" for name in sorted(headers)]

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in {**beside, source.name: text}.items():
                (Path(folder) / name).write_text(content)
            _check([*command, str(Path(folder) / source.name), "-o", str(target)])

    return _cached("\0".join(content), source.stem + suffix, build)


def included(text: str) -> set[Path]:
    """The headers of the shim, of csrc/cuda and of csrc/common that a source includes."""
    found: set[Path] = set()
    waiting = re.findall(r'#include "([^"]+)"', text)
    while waiting:
        name = Path(waiting.pop()).name
        for path in (folder / name for folder in (SHIM, CUDA, COMMON)):
            if path.exists() and path not in found:
                found.add(path)
                waiting += re.findall(r'#include "([^"]+)"', path.read_text())
    return found


def _linked(command: list[str], objects: list[Path]) -> Path:
    names = "\0".join([*command, *map(str, objects)])
    return _cached(names, "driver",
                   lambda target: _check([*command, *map(str, objects), "-o", str(target)]))


def _cached(content: str, name: str, build) -> Path:
    """The file that `build` makes, renamed when complete, since processes build in parallel."""
    CACHE.mkdir(parents=True, exist_ok=True)
    target = CACHE / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}-{name}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / name
            build(made)
            os.replace(made, target)
    return target


def _check(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
