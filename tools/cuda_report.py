"""Write bench/gpu/CUDA.md: what the CUDA kernels take, and which checks notice seeded bugs.

`make gpu-reports` runs it with tests, tests/gpu and tests/gpu/cuda on PYTHONPATH.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cuda_calls
import gpu_traffic
import torch
from cuda_bugs import BUGS, CHECKS, noticed, ptx_tally
from cuda_cases import deit, traffic
from cuda_host import CUDA, KERNELS, ROOT, Host, Launch
from cuda_ptx import outside
from ptx.parser import search
from stub_driver import compiling_for

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FLAGS = ["-std=c++17", "-O3", "-Xptxas=-v,--warn-on-spills,-Werror"]
NAME = re.compile(r"\d((?:[a-z]+_)+)kernelI(.*?)EEv")
TYPES = {"6__half": "fp16", "13__nv_bfloat16": "bf16", "f": "fp32", "d": "fp64"}


@dataclass(frozen=True)
class Resources:
    """Registers of one thread of a kernel, and bytes that it spills, on one architecture."""

    kernel: str
    architecture: int
    registers: int
    spilled: int


def resources(architecture: int) -> Iterator[Resources]:
    """ptxas's report on every kernel; RuntimeError if one spills."""
    for source in KERNELS:
        with tempfile.TemporaryDirectory() as folder:
            # The host code is the same for all architectures, so it is compiled for one of them.
            output = "-c" if architecture == ARCHITECTURES[0] else "-cubin"
            command = ["nvcc", *FLAGS, f"-arch=sm_{architecture}", f"-I{CUDA}", output,
                       str(CUDA / source), "-o", str(Path(folder) / "kernel.o")]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        for part in done.stderr.split("Compiling entry function ")[1:]:
            spilled, used = (search(pattern, part) for pattern in
                             (r"(\d+) bytes spill stores", r"Used (\d+) registers"))
            yield Resources(spelled(part), architecture, int(used[1]), int(spilled[1]))


def spelled(mangled: str) -> str:
    """A mangled name in words, such as "low_rank_linear fp16, 64 rows"."""
    stem, arguments = search(NAME, mangled).groups()
    stem = stem.removesuffix("_")
    kind = next(key for key in TYPES if arguments.startswith(key))
    rest = arguments[len(kind):]
    if "Li" in rest:
        rows = search(r"Li(\d+)", rest)[1]
        return f"{stem} {TYPES[kind]}, {rows} rows"
    variant = {"Lb1ELb0": ", a warp", "Lb0ELb0": ", a block", "Lb0ELb1": ", a block, V in global"}
    return f"{stem} {TYPES[kind]}{variant.get(rest.removesuffix('E'), '')}"


def resource_table() -> str:
    found: dict[str, dict[int, Resources]] = {}
    for architecture in ARCHITECTURES:
        for one in resources(architecture):
            found.setdefault(one.kernel, {})[architecture] = one
    lines = ["| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " | spilled |",
             "| --- |" + " --- |" * (len(ARCHITECTURES) + 1)]
    for kernel, by in sorted(found.items()):
        registers = " | ".join(str(by[a].registers) for a in ARCHITECTURES)
        lines.append(f"| {kernel} | {registers} | {sum(one.spilled for one in by.values())} |")
    return "\n".join(lines)


def shared_table() -> str:
    """Threads and bytes of dynamic shared memory of one block, as the launchers request them."""
    lines = ["| kernel | sizes | threads | shared |", "| --- | --- | --- | --- |"]
    for m, n, dtype in ((16, 16, torch.float32), (32, 32, torch.float32), (64, 64, torch.float32),
                        (128, 128, torch.float32), (64, 64, torch.float64),
                        (128, 128, torch.float64)):
        launches: list[Launch] = []
        cuda_calls.batched_svd(Host(launches=launches), torch.eye(m, n, dtype=dtype)[None], 1)
        name = str(dtype).removeprefix("torch.")
        lines.append(_shared("batched_svd", f"{m} x {n}, {name}", launches[0]))
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for rank in (128, 256):
            for rows, multiprocessors in (("few", 132), ("many", 1)):
                launches = []
                host = Host("quick", multiprocessors=multiprocessors, launches=launches)
                x, v, u = (torch.zeros(s, dtype=dtype) for s in ((1, 8), (8, rank), (8, rank)))
                cuda_calls.low_rank_linear(host, x, v, u)
                cuda_calls.low_rank_mlp(host, x, v, u, None, v, u, None, None)
                for op, launch in zip(("low_rank_linear", "low_rank_mlp"), launches, strict=True):
                    lines.append(_shared(op, f"rank {rank}, {name}, {rows} rows", launch))
        for rank in (32, 64):
            launches = []
            x, w, out = (torch.zeros(s, dtype=dtype) for s in ((1, 8, 8), (rank, 8), (8, rank)))
            cuda_calls.low_rank_attention(Host("quick", launches=launches), x, w, None, w, w, out,
                                          None, 1, 1.0)
            lines.append(_shared("attention", f"rank {rank}, {name}", launches[1]))
    return "\n".join(lines)


def _shared(kernel: str, sizes: str, launch: Launch) -> str:
    return f"| {kernel} | {sizes} | {launch.threads} | {launch.shared} |"


def traffic_table() -> str:
    """What the emulator counts for one image of DeiT-S in 16 bits, beside the model of Triton's."""
    lines = ["| op | multiprocessors | launches | blocks | moved / minimum | requested, KiB "
             "| Triton: launches | moved / minimum | requested, KiB |", "|" + " --- |" * 9]
    shapes = gpu_traffic.shapes()
    beside = {"low_rank_linear": "DeiT-S b1 proj", "low_rank_mlp": "DeiT-S b1 MLP"}
    for op, tensors in deit(197, 384, 128, 6).items():
        for multiprocessors in (108, 132):
            found, least = traffic(op, tensors, "sm_80", multiprocessors)
            theirs = "– | – | –"
            if op in beside:
                with compiling_for("sm_80" if multiprocessors == 108 else "sm_90"):
                    shape = shapes[beside[op]]
                    ratio = gpu_traffic.moved(shape, gpu_traffic.GPUS["sm_80"].cache_size)
                    theirs = (f"{len([*gpu_traffic.launches(shape)])} | "
                              f"{ratio / shape.minimum:.3f} | "
                              f"{gpu_traffic.requested(shape) // 1024}")
            blocks = " + ".join(str(one.blocks) for one in found)
            asked = sum(one.requested() for one in found) // 1024
            lines.append(f"| {op} | {multiprocessors} | {len(found)} | {blocks} | "
                         f"{outside(found) / least:.3f} | {asked} | {theirs} |")
    return "\n".join(lines)


def bug_table() -> str:
    lines = ["| file | bug | " + " | ".join(CHECKS) + " |",
             "| --- | --- |" + " --- |" * len(CHECKS)]
    said = {"results": "wrong", None: "–", "exit code 97": "refused", "exit code 66": "race",
            "exit code 1": "reported"}
    for bug in BUGS:
        outcomes = [noticed(bug, check) for check in CHECKS]
        cells = " | ".join(said.get(outcome, "crash") for outcome in outcomes)
        lines.append(f"| {bug.file} | {bug.name} | {cells} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def ptx_table() -> str:
    lines = ["| kernel | damage | caught | of |", "| --- | --- | --- | --- |"]
    for op in ("batched_svd", "low_rank_linear", "low_rank_mlp", "low_rank_attention"):
        for kind, tally in ptx_tally(op, "sm_80").items():
            if tally["all"]:
                lines.append(f"| {op} | {kind} | {tally['caught']} | {tally['all']} |")
    return "\n".join(lines)


def main() -> None:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = search(r"release ([\d.]+)", version)[1]
    text = f"""# What the CUDA kernels take, and what their checks notice

Generated by `make gpu-reports` with nvcc {release}. Timings stand in RESULTS.md.

Registers of one thread on each architecture, and bytes spilled on all of them together. A spill
fails the build.

{resource_table()}

Threads and bytes of dynamic shared memory of one block, as the launchers request them with the
227 KiB of sm_90:

{shared_table()}

Bytes that one image of DeiT-S moves in 16 bits (rank 128 in the MLP, 32 and 48 in the six heads),
as the emulator counts them on nvcc's PTX for sm_80, with the blocks that the launchers choose for
an A100 (108 multiprocessors) and an H100 (132). "Moved" are the distinct sectors of inputs and
outputs; what one launch leaves to the next is workspace and does not count. "Requested" is what
all warps ask of the caches. Beside them stands the model of the Triton kernels (ROOFLINE.md).

{traffic_table()}

Seeded bugs in the sources, run as host C++ under three checks. `plain` compares results in two
random orders of execution; `asan` is AddressSanitizer with UndefinedBehaviorSanitizer; `tsan` is
ThreadSanitizer. In the cells "wrong" means wrong results, "refused" that the CPU model ended the
run, and "–" that the check did not notice the bug.

{bug_table()}

Mutants of nvcc's PTX for sm_80, executed by the emulator with its race check. Each mutant leaves
out one barrier or one wait, transposes one `ldmatrix`, or exchanges the operands of one `mma`
(every eighth instruction of the last two kinds). `batched_svd` runs on a tall and a wide matrix.
Of attention the kernel between the projections is damaged.

{ptx_table()}
"""
    target = ROOT / "bench" / "gpu" / "CUDA.md"
    made = target.with_suffix(".tmp")
    made.write_text(text, encoding="utf-8")
    os.replace(made, target)


if __name__ == "__main__":
    main()
