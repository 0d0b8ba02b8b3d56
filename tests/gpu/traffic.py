"""A model of the bytes that the fused kernels move, and the roofline that follows from it.

Each program owns some rows: it reads them once and all weights, which stay in the L2 cache, and
writes its outputs once. So device memory sees every input and output once; the cache sees the
weights once for each program. Where rows are few, several programs share them: the cache also sees
x and V once for each of these, and of an MLP the parts of a sum, written and read again.
`python tests/gpu/traffic.py` writes bench/gpu/ROOFLINE.md.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from stub_driver import compiling_for

from adacomcat.kernels import tiles

ROOT = Path(__file__).parent.parent.parent
SIZE = 2  # bytes an element
# FLOP/s in 16 bits, bytes/s of device memory and of the cache, bytes of the cache: data sheets of
# the A100 SXM 80 GB and the H100 SXM; the cache's bandwidth is what microbenchmarks publish.
GPUS = {
    "sm_80": (312e12, 2.04e12, 5.0e12, 40 << 20),
    "sm_90": (989e12, 3.35e12, 5.5e12, 50 << 20),
}


@dataclass(frozen=True)
class Shape:
    """A projection k → n at rank r, or with `hidden` an MLP k → hidden → n at ranks r."""

    m: int
    k: int
    n: int
    r: int
    hidden: int = 0

    @property
    def weights(self) -> int:
        """Bytes of factors and biases."""
        if not self.hidden:
            return SIZE * (self.r * (self.k + self.n) + self.n)
        factors = self.r * (self.k + self.hidden) + self.r * (self.hidden + self.n)
        return SIZE * (factors + self.hidden + self.n)

    @property
    def minimum(self) -> int:
        """Each input once, each output once."""
        return SIZE * self.m * (self.k + self.n) + self.weights

    @property
    def tile(self) -> tiles.Tile:
        return tiles.row_tile(self.m, self.r, torch.empty(0, dtype=torch.float16))

    @property
    def row_blocks(self) -> int:
        return triton.cdiv(self.m, self.tile.BLOCK_M)

    def shared_out(self, columns: int) -> int:
        """Programs that own the same rows and a part each of these columns, or hidden units."""
        share = tiles.columns_per_part(columns, self.tile.BLOCK_N, self.row_blocks)
        return triton.cdiv(columns, share)


@dataclass(frozen=True)
class Launch:
    """What one launch does: FLOPs, bytes of inputs and outputs, bytes that programs ask for."""

    flops: int
    weights: int
    rows: int  # bytes of x and y
    requested: int
    programs: int
    workspace: int = 0  # bytes written for the next launch, or read from the last one


def launches(shape: Shape) -> list[Launch]:
    """One for a linear or for many rows; an MLP of few rows adds up its parts in a second one.

    Programs that share rows each read x and V, and compute x V.
    """
    m, blocks, r = shape.m, shape.row_blocks, shape.r
    parts = shape.shared_out(shape.hidden or shape.n)
    x, y, v, last = SIZE * m * shape.k, SIZE * m * shape.n, SIZE * shape.k * r, SIZE * shape.n * r
    again = (parts - 1) * (x + blocks * v)
    flops = 2 * m * (shape.weights // SIZE + (parts - 1) * shape.k * r)
    if not shape.hidden or parts == 1:
        asked = x + y + blocks * shape.weights + again
        return [Launch(flops, shape.weights, x + y, asked, blocks * parts)]
    out, room = last + SIZE * shape.n, 4 * parts * m * r
    first, columns = shape.weights - out, shape.shared_out(shape.n)
    return [
        Launch(flops - 2 * m * out // SIZE, first, x, x + again + blocks * first + room,
               blocks * parts, room),
        Launch(2 * m * out // SIZE + columns * parts * m * r, out, y,
               y + blocks * out + columns * room, blocks * columns, room),
    ]  # fmt: skip


def moved(shape: Shape, cache: int) -> int:
    """Bytes between device memory and cache; weights that do not fit are read by every wave.

    What one launch leaves to the next stays in the cache, in which it is small.
    """
    total = 0
    for one in launches(shape):
        waves = 1
        if one.weights + one.workspace > cache // 2:
            waves = triton.cdiv(one.programs, tiles.multiprocessors())
        total += one.rows + waves * one.weights
    return total


def workspace(shape: Shape) -> int:
    """Bytes written for the next launch."""
    return max(one.workspace for one in launches(shape))


def moved_with_workspace(shape: Shape, cache: int) -> int:
    """As `moved`, from a cache that kept nothing of what one launch leaves to the next."""
    return moved(shape, cache) + sum(one.workspace for one in launches(shape))


def requested(shape: Shape) -> int:
    """Bytes that programs ask the cache for, or write."""
    return sum(one.requested for one in launches(shape))


def seconds(flop: float, memory: float, cache: float, architecture: str) -> float:
    """The roofline: whichever of arithmetic, memory and cache takes longest."""
    peak, bandwidth, cache_bandwidth, _ = GPUS[architecture]
    return max(flop / peak, memory / bandwidth, cache / cache_bandwidth)


def dense(shape: Shape, architecture: str) -> float:
    """Products with the dense weights; an MLP writes its hidden layer and reads it again."""
    if not shape.hidden:
        byte = SIZE * (shape.m * (shape.k + shape.n) + shape.k * shape.n)
        return seconds(2 * shape.m * shape.k * shape.n, byte, 0, architecture)
    first = Shape(shape.m, shape.k, shape.hidden, 0)
    second = Shape(shape.m, shape.hidden, shape.n, 0)
    return dense(first, architecture) + dense(second, architecture)


def products(shape: Shape, architecture: str) -> float:
    """One product after the other, each middle written and read again."""
    if not shape.hidden:
        return dense(Shape(shape.m, shape.k, shape.r, 0), architecture) + dense(
            Shape(shape.m, shape.r, shape.n, 0), architecture
        )
    first = Shape(shape.m, shape.k, shape.hidden, shape.r)
    second = Shape(shape.m, shape.hidden, shape.n, shape.r)
    return products(first, architecture) + products(second, architecture)


def ours(shape: Shape, architecture: str) -> float:
    """Slowed by the processors that a small grid leaves idle, which also ask for less."""
    total = 0.0
    for one in launches(shape):
        busy = min(1.0, one.programs / tiles.multiprocessors())
        total += seconds(one.flops / busy, 0, one.requested / busy, architecture)
    return max(total, moved(shape, GPUS[architecture][3]) / GPUS[architecture][1])


def shapes() -> dict[str, Shape]:
    found = {}
    for model, d, r in (("DeiT-S", 384, 128), ("DeiT-B", 768, 256)):
        for batch in (1, 64):
            m = 197 * batch
            found[f"{model} b{batch} proj"] = Shape(m, d, d, r)
            found[f"{model} b{batch} fc1"] = Shape(m, d, 4 * d, r)
            found[f"{model} b{batch} fc2"] = Shape(m, 4 * d, d, r)
            found[f"{model} b{batch} MLP"] = Shape(m, d, d, r, 4 * d)
    return found


def moved_table() -> str:
    """Bytes moved relative to the minimum, without and with the parts of a sum; BUDGETS.md has it.
    """
    lines = ["| shape | GPU | minimum, KiB | moved / minimum | parts, KiB | with the parts |",
             "|" + " --- |" * 6]
    for name, shape in shapes().items():
        for architecture, (*_, cache) in GPUS.items():
            with compiling_for(architecture):
                without, with_parts = (f(shape, cache) / shape.minimum
                                       for f in (moved, moved_with_workspace))
                lines.append(f"| {name} | {architecture} | {shape.minimum / 1024:.0f} | "
                             f"{without:.3f} | {workspace(shape) / 1024:.0f} | {with_parts:.3f} |")
    return "\n".join(lines)


def table() -> str:
    lines = ["| shape | GPU | rank | moved / minimum | launches | parts, KiB | dense | products "
             "| ours |", "|" + " --- |" * 9]
    for name, shape in shapes().items():
        for architecture in GPUS:
            with compiling_for(architecture):
                ratio = moved(shape, GPUS[architecture][3]) / shape.minimum
                times = [f(shape, architecture) * 1e6 for f in (dense, products, ours)]
                count, room = len(launches(shape)), workspace(shape) / 1024
                lines.append(f"| {name} | {architecture} | {shape.r} | {ratio:.3f} | {count} | "
                             f"{room:.0f} | " + " | ".join(f"{time:.1f}" for time in times) + " |")
    return "\n".join(lines)


TEXT = """# Predicted times of the Triton kernels: a roofline, nothing measured

Prediction. Generated by `python tests/gpu/traffic.py`. Microseconds in 16 bits on an A100 (sm_80)
and an H100 (sm_90): for the dense weights, for the low-rank products one after the other, and for
the fused kernel; each the longest of arithmetic at the data sheet's peak, device memory, and for
ours the cache, shared out over as many processors as the grid has programs. No launch costs, no
latency. At batch 1 these decide. There 13 blocks of rows cannot keep a GPU busy: they are shared by
several programs, each of which computes x V again, and an MLP takes a second launch to add up the
parts of h V2. So at batch 1 one launch or two instead of two or four are the fused kernels'
advantage, and the last column their handicap. Moved / minimum is of inputs and outputs. The parts
are counted as traffic of the cache, which holds fifty times as much; a cache that wrote them back
to memory would move up to as much again.
No kernel has run on a GPU yet; `make gpu-check` measures.

"""

if __name__ == "__main__":
    folder = ROOT / "bench" / "gpu"
    folder.mkdir(exist_ok=True)
    (folder / "ROOFLINE.md").write_text(TEXT + table() + "\n")
