"""Registers, spills, shared memory and access widths of every Triton kernel, without a GPU.

`make gpu-reports` runs it with tests/gpu on PYTHONPATH; it writes bench/gpu/BUDGETS.md and
kernels/known.json. tests/gpu/triton/test_resources.py imports `measured` and `compile_all`.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_traffic import moved_table
from kernel_cases import DTYPES, draw, incoming, precision, run_kernels
from kernel_shapes import vision
from ptx.parser import parse, search
from stub_driver import TARGETS, compiling_for
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parents[1]
# A multiprocessor's registers, warps, blocks, bytes of shared memory, and bytes for one block.
MULTIPROCESSOR = {
    80: (65536, 64, 32, 167936, 166912),
    89: (65536, 48, 24, 102400, 101376),
    90: (65536, 64, 32, 233472, 232448),
    100: (65536, 64, 32, 233472, 232448),
}
TILE_LINES = ("load_tile", "store_tile")


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture; `blocks` is None for AMD."""

    kernel: str
    architecture: str
    dtype: str
    warps: int
    registers: int
    spilled: int  # bytes a thread
    shared: int
    blocks: int | None  # that fit on a multiprocessor
    tensor_core: int  # instructions
    narrow: int  # instructions that move less than 128 bits of a tile


class _WithoutProducts(TorchDispatchMode):
    """Library products give memory that nobody reads: CPUs take minutes for them in 16 bits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten.mm.default:
            return args[0].new_empty(len(args[0]), args[1].shape[1])
        return func(*args, **(kwargs or {}))


def compile_all(architecture: str, run: Callable[[], object]) -> Iterator[tuple[str, Any]]:
    """Name and compiled form of every kernel that `run` launches; nothing is executed.

    NVIDIA kernels are compiled to PTX, and `measure` compiles that to machine code.
    """
    found = []
    run_on_gpu = JITFunction.run

    def compile_only(self: JITFunction, *args, grid, warmup, **options):
        self.device_caches.clear()
        compiled = run_on_gpu(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, compiled))
        return compiled

    JITFunction.run = compile_only
    try:
        with compiling_for(architecture), _WithoutProducts():
            run()
    finally:
        JITFunction.run = run_on_gpu
    return iter(found)


_measured: dict[tuple[str, str], Resources] = {}


def measure(name: str, compiled: Any, architecture: str, dtype: str) -> Resources:
    """The resources of a compiled kernel, cached by its hash."""
    key = compiled.hash, dtype
    if key not in _measured:
        _measured[key] = _measure(name, compiled, architecture, dtype)
    return _measured[key]


def _measure(name: str, compiled: Any, architecture: str, dtype: str) -> Resources:
    metadata = compiled.metadata
    if metadata.target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def value(key: str) -> int:
            return int(search(rf"\.{key}:\s+(\d+)", text)[1])

        spilled = value("private_segment_fixed_size") + 4 * value("vgpr_spill_count")
        matrix = len(re.findall(r"^\s+v_mfma_", text, re.M))
        narrow = _narrow_on_amd(text)
        return Resources(name, architecture, dtype, metadata.num_warps, value("vgpr_count"),
                         spilled, metadata.shared, None, matrix, narrow)
    ptx, arch = compiled.asm["ptx"], metadata.target.arch
    log = _ptxas_log(ptx, metadata)
    registers = int(search(r"Used (\d+) registers", log)[1])
    local = int(search(r"(\d+) bytes stack frame", log)[1])  # includes spilled registers
    return Resources(
        name, architecture, dtype, metadata.num_warps, registers, local, metadata.shared,
        _blocks(arch, registers, metadata.shared, metadata.num_warps),
        *_tensor_core_and_narrow(ptx),
    )  # fmt: skip


def _ptxas_log(ptx: str, metadata: Any) -> str:
    """The log of ptxas, called as Triton calls it."""
    backend: Any = make_backend(metadata.target)
    make_cubin = backend.make_cubin
    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        make_cubin(ptx, {}, metadata, metadata.target.arch)
    return log.getvalue()


def _blocks(architecture: int, registers: int, shared: int, warps: int) -> int:
    """Blocks that one multiprocessor holds; a warp allocates registers in units of 256."""
    file, most_warps, most_blocks, memory, _ = MULTIPROCESSOR[architecture]
    by_registers = file // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = memory // (shared + 1024)
    return min(most_warps // warps, most_blocks, by_registers, by_shared)


def _tile_lines() -> set[str]:
    """The lines of blocks.py that move tiles, as "blocks.py:LINE"; all others move vectors."""
    lines = (ROOT / "kernels" / "blocks.py").read_text(encoding="utf-8").splitlines()
    found, inside = set(), False
    for number, line in enumerate(lines, 1):
        if line.startswith("def "):
            inside = line[4:].split("(")[0] in TILE_LINES
        if inside:
            found.add(f"blocks.py:{number}")
    return found


def _tensor_core_and_narrow(ptx: str) -> tuple[int, int]:
    tile_lines, matrix, narrow = _tile_lines(), 0, 0
    for instruction in parse(ptx).code:
        name, parts = instruction.parts[0], instruction.parts
        matrix += "mma" in parts or name == "wgmma" and "mma_async" in parts
        if instruction.where not in tile_lines or name not in ("ld", "st", "cp"):
            continue
        if name == "cp":
            narrow += len(instruction.operands) > 2 and int(instruction.operands[2], 0) < 16
        elif "global" in parts:
            vector = re.search(r"\.v(\d)", instruction.opcode)
            width = int(parts[-1][1:]) // 8 * int(vector[1] if vector else 1)
            narrow += width < 16
    return matrix, narrow


def _narrow_on_amd(assembly: str) -> int:
    tile_lines, where, count = _tile_lines(), "", 0
    for line in assembly.splitlines():
        if place := re.match(r"\s+\.loc\s.*; ?(\S*?:\d+):\d+", line):
            where = place[1]
        moved = re.match(r"\s+(?:global|buffer|flat)_(?:load|store)_(\w+)", line)
        count += bool(moved) and where in tile_lines and moved[1] != "dwordx4"
    return count


def measured(
    architecture: str, dtype_name: str, model: str = "deit_s", images: int = 2
) -> list[Resources]:
    """The kernels of all ops, forward and backward, for some images of a DeiT."""
    dtype, setting = DTYPES[dtype_name]
    found: dict[str, Resources] = {}
    for case in vision(model, 197 * images):
        arguments = draw(case, dtype)
        grad = incoming(case, arguments)
        with precision(setting):
            for name, compiled in compile_all(
                architecture, lambda: run_kernels(case, arguments, grad)  # noqa: B023
            ):
                one = measure(name, compiled, architecture, dtype_name)
                # One kernel compiles to several variants; the report has the worst of each number.
                known = found.get(name)
                found[name] = one if known is None else _worse(known, one)
    return list(found.values())


def _worse(a: Resources, b: Resources) -> Resources:
    least = ("blocks", "tensor_core")
    values = {}
    for key, value in asdict(a).items():
        other = getattr(b, key)
        if isinstance(value, int):
            value = min(value, other) if key in least else max(value, other)
        values[key] = value
    return Resources(**values)


def main() -> None:
    torch.set_num_threads(1)
    rows = [one for dtype in ("fp16", "fp32") for arch in TARGETS for one in measured(arch, dtype)]
    large = [one for arch in TARGETS for one in measured(arch, "fp16", images=64)]
    wide = [one for arch in TARGETS
            for dtype, images in (("fp16", 2), ("fp16", 64), ("fp32", 2), ("tf32", 2))
            for one in measured(arch, dtype, "deit_b", images) if one.spilled or one.narrow]
    folder = ROOT / "bench" / "gpu"
    folder.mkdir(exist_ok=True)
    text = TEXT.format(triton=triton.__version__, small=_table(rows), large=_table(large),
                       wide=_table(wide), moved=moved_table())
    (folder / "BUDGETS.md").write_text(text, encoding="utf-8")
    known = [asdict(row) for row in rows]
    (ROOT / "kernels" / "known.json").write_text(
        json.dumps({"triton": triton.__version__, "kernels": known}, indent=1) + "\n",
        encoding="utf-8")


def _table(rows: list[Resources]) -> str:
    header = ["kernel", "architecture", "dtype", "warps", "registers", "spilled", "shared",
              "blocks", "tensor_core", "narrow"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in sorted(rows, key=lambda r: (r.kernel, r.dtype, list(TARGETS).index(r.architecture))):
        lines.append("| " + " | ".join(
            "–" if value is None else str(value) for value in asdict(row).values()) + " |")
    return "\n".join(lines)


TEXT = """# What the Triton kernels take

Generated by `make gpu-reports` with triton {triton}.

Generate it again after a change to a kernel or to `kernels/tiles.py`. Each kernel is compiled as
for a GPU, for DeiT-S with rank 128 in the MLP, 32 for queries and keys, and 48 for values. `fp32`
is exact (tf32x3). The columns:

- registers: of one thread.
- spilled: bytes of one thread in local memory.
- shared: bytes of shared memory of one block.
- blocks: how many blocks fit on one multiprocessor at once.
- tensor_core: tensor-core instructions in the code.
- narrow: loads and stores of a tile that move less than 128 bits; biases do not count.

`tests/gpu/triton/test_resources.py` requires that no kernel spills or has narrow accesses, in any
type. That includes tf32, which these two tables leave out.

## Two images

{small}

## 64 images

{large}

## DeiT-B: what is spilled or narrow

The table lists the kernels at rank 256 that spill or have narrow accesses, out of all kernels for
two images in `fp16`, `fp32` and `tf32`, and for 64 images in `fp16`. A wide rank runs as plain
products, because exact products keep both halves of each operand in registers, and an MLP then
writes its hidden layer.

{wide}

## Bytes moved

Bytes between device memory and L2 cache in 16 bits, by the model of `tools/gpu_traffic.py`, which
agrees with the emulator's counts. The minimum reads each input once and writes each output once.
With few rows, and in the MLP of DeiT-B on sm_90, one launch leaves x V or split-k partial sums to
the next. This workspace is written and read again, and stays in the cache, of which it takes at
most a fifth. The column "moved / minimum" leaves it out; its limit is 1.15. The last column
counts it as if the cache kept nothing.

{moved}
"""


if __name__ == "__main__":
    sys.exit(main())
