"""csrc/cuda as host C++: builds with the shim, and the kernels as functions of CPU tensors.

Each call runs in a process of its own, so that a fault, a deadlock or a sanitizer ends only that.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[3]
SHIM = Path(__file__).parent / "shim"
CUDA = ROOT / "csrc" / "cuda"
COMMON = ROOT / "csrc" / "common"
KERNELS = ("batched_svd.cu", "low_rank_linear.cu", "truncation_errors.cu")
# Compiler flags of the kernels and defines of the shim.
MODES = {
    "plain": (["-O2"], []),
    "quick": (["-O1"], []),  # compiles quickly
    "asan": (["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr",
              "-fno-sanitize-recover=undefined"], ["-DSHIM_ASAN"]),
    "tsan": (["-O1", "-g1", "-fsanitize=thread"], ["-DSHIM_TSAN"]),
}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu", "relu")
CACHE = Path(tempfile.gettempdir()) / f"adacomcat-cuda-shim-{os.getuid()}"


def missing() -> str | None:
    """Why the shim cannot be built here; None if it can."""
    if platform.machine() != "x86_64":
        return "the shim switches stacks in x86-64 assembly"
    return None if shutil.which("g++") else "the shim needs g++"


class Failed(AssertionError):
    """The process ended with an error; the message has its output."""


@dataclass(frozen=True)
class Host:
    """A build with its mode and replaced sources (by file name), and a seed of the warps' order."""

    mode: str = "plain"
    sources: dict[str, str] = field(default_factory=dict, hash=False)
    seed: int = 0
    # `run` appends (blocks, threads of a block, bytes of shared memory) for each launch.
    launches: list[tuple[int, int, int]] = field(default_factory=list, hash=False)

    def run(self, op: str, numbers: Sequence[int], inputs: Sequence[Tensor],
            outputs: Sequence[Tensor]) -> None:
        """Run the kernel on `inputs` and fill `outputs`."""
        command = [str(self.executable()), op, *(str(int(number)) for number in numbers)]
        environment = {**os.environ, "SHIM_SEED": str(self.seed),
                       "TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
        try:
            done = subprocess.run(command, input=b"".join(map(to_bytes, inputs)),
                                  capture_output=True, env=environment,
                                  timeout=300)
        except subprocess.TimeoutExpired:
            raise Failed(f"{op} does not end") from None
        if done.returncode:
            raise Failed(f"{op}, exit code {done.returncode}: {done.stderr.decode()[-4000:]}")
        for line in done.stderr.decode().splitlines():
            if line.startswith("launch "):
                blocks, threads, shared = map(int, line.split()[1:])
                self.launches.append((blocks, threads, shared))
        at = 0
        for output in outputs:
            size = output.numel() * output.element_size()
            output.copy_(from_bytes(done.stdout[at : at + size], output))
            at += size
        assert at == len(done.stdout)

    def executable(self) -> Path:
        """The driver executable, linked from cached objects."""
        flags, defines = MODES[self.mode]
        common = ["g++", "-std=c++17", f"-I{SHIM}", f"-I{CUDA}"]
        objects = [
            built([*common, "-O2", *defines, "-c"], SHIM / "shim.cpp", ".o"),
            built([*common, *flags, "-c"], SHIM / "driver.cpp", ".o"),
            *(built([*common, *flags, "-x", "c++", "-c"], CUDA / name, ".o", self.sources)
              for name in KERNELS),
        ]
        return _linked(["g++", *flags], objects)


def replaced(name: str, old: str, new: str) -> dict[str, str]:
    """The sources of a build in which one file of csrc/cuda has `new` instead of `old`."""
    source = (CUDA / name).read_text()
    if source.count(old) != 1:
        raise ValueError(f"{name} has {source.count(old)} times: {old}")
    return {name: source.replace(old, new)}


def tile_of(rows: int) -> dict[str, str]:
    """Sources in which low_rank_linear takes tiles of 16 rows, or else always the large ones."""
    if rows == 16:
        return {}
    return replaced("low_rank_linear.cu", "kEnoughBlocks = 128", "kEnoughBlocks = 0")


def needs_scratch(a: Tensor, available: int) -> bool:
    """Whether a matrix and its rotations together exceed the shared memory."""
    answer = torch.empty(1, dtype=torch.int32)
    Host().run("svd_needs_scratch", [a.element_size(), *a.shape[-2:], available], [], [answer])
    return bool(answer)


def batched_svd(host: Host, a: Tensor, k: int,
                available: int = 227 * 1024) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, s, v and the status of each matrix of a (count, m, n), whatever its strides."""
    count, m, n = a.shape
    flat = a.as_strided((a.untyped_storage().nbytes() // a.element_size(),), (1,), 0)
    assert a.storage_offset() == 0
    u, s, v = a.new_empty(count, m, k), a.new_empty(count, k), a.new_empty(count, n, k)
    status = torch.empty(count, dtype=torch.int32)
    numbers = [a.element_size(), count, m, n, k, *a.stride(), flat.numel(), available]
    host.run("batched_svd", numbers, [flat], [u, s, v, status])
    return u, s, v, status


def truncation_errors(host: Host, s: Tensor) -> Tensor:
    """errors (count, ranks + 1) of s (count, heads, ranks)."""
    errors = s.new_empty(s.shape[0], s.shape[2] + 1)
    host.run("truncation_errors", [s.element_size(), *s.shape], [s], [errors])
    return errors


def low_rank_linear(host: Host, x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None,
                    activation: str | None = None, residual: Tensor | None = None,
                    keep_intermediates: bool = False) -> tuple[Tensor, Tensor]:
    """y and x V; the rows of x (m, in), V, U and the residual (m, out) may lie apart."""
    (m, k), r, n = x.shape, v.shape[1], u.shape[0]
    y, middle = x.new_empty(m, n), x.new_empty((m, r) if keep_intermediates else (0,))
    strided = [x, v, u, x[:0] if residual is None else residual]
    inputs = [memory(t) for t in strided]
    inputs.insert(3, x.new_empty(0) if bias is None else bias)
    host.run("low_rank_linear",
             [TYPES[x.dtype], m, k, r, n, ACTIVATIONS.index(activation), keep_intermediates,
              *(t.stride(0) for t in strided), *(t.numel() * t.element_size() for t in inputs)],
             inputs, [y, middle])
    return y, middle


def memory(t: Tensor) -> Tensor:
    """The memory that a matrix with dense rows spans, as a vector."""
    if t.numel() == 0:
        return t.new_empty(0)
    return t.as_strided(((t.shape[0] - 1) * t.stride(0) + t.shape[1],), (1,))


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
    # A replaced header lies beside the source, where it comes before the include folders.
    beside = {name: other for name, other in replacing.items()
              if f'"{name}"' in text and name.endswith("h")}
    folders = (SHIM.glob("*.h"), CUDA.glob("*.h"), CUDA.glob("*.cuh"), COMMON.glob("*.h"))
    headers = sorted(header for found in folders for header in found)
    content = [*command, source.name, text, *beside.values(), *(h.read_text() for h in headers)]

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in {**beside, source.name: text}.items():
                (Path(folder) / name).write_text(content)
            _check([*command, str(Path(folder) / source.name), "-o", str(target)])

    return _cached("\0".join(content), source.stem + suffix, build)


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
