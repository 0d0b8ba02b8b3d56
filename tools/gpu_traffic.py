"""A model of the bytes that the fused kernels move, and the roofline that follows from it.

Each program reads its rows once and all weights, and writes its outputs once. Weights stay in the
L2 cache, so device memory sees each input and output once, and the cache sees the weights once a
program. With few rows several programs share them: then each of those reads x and V, or x V is a
launch of its own, and an MLP writes and reads split-k partial sums.

`make gpu-reports` runs it with tests/gpu on PYTHONPATH; it writes bench/gpu/ROOFLINE.md.
tests/gpu/triton/test_traffic.py compares the model with the emulator's counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from stub_driver import compiling_for

from adacomcat.kernels import tiles  # pyright: ignore[reportMissingImports]  (it lies in kernels/)

ROOT = Path(__file__).parents[1]
SIZE = 2  # bytes an element
LIKE = torch.empty(0, dtype=torch.float16)


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU, from the data sheets of the A100 SXM 80 GB and the H100 SXM.

    The L2 bandwidth comes from published microbenchmarks; a multiprocessor reads 64 bytes a clock.
    """

    flops: float  # a second, in 16 bits
    memory: float  # bytes a second
    cache: float  # bytes a second
    processor: float  # bytes a second from the L2 cache to one multiprocessor
    cache_size: int
    shared_tiles: int  # programs of a library's largest tile that read one operand together
    launch: float = 1e-6  # seconds of a launch in a CUDA graph: an assumption


GPUS = {
    "sm_80": Gpu(312e12, 2.04e12, 5.0e12, 90e9, 40 << 20, 1),
    "sm_90": Gpu(989e12, 3.35e12, 5.5e12, 112e9, 50 << 20, 2),
}
# The tiles of a library of dense products: rows, columns, and splits of the sum.
LIBRARY = [(rows, columns, parts)
           for rows, columns in ((128, 256), (128, 128), (64, 128), (64, 64), (32, 64), (16, 64))
           for parts in (1, 2, 4, 8)]


@dataclass(frozen=True)
class Shape:
    """A projection k → n at rank r, or with `hidden` an MLP k → hidden → n at ranks r.

    A gated MLP computes its hidden layer from two second factors.
    """

    m: int
    k: int
    n: int
    r: int
    hidden: int = 0
    gated: bool = False

    @property
    def made(self) -> int:
        """Columns that the first product of an MLP makes: twice the hidden ones for a gate."""
        return self.hidden * (2 if self.gated else 1)

    @property
    def weights(self) -> int:
        """Bytes of factors and biases."""
        if not self.hidden:
            return SIZE * (self.r * (self.k + self.n) + self.n)
        factors = self.r * (self.k + self.made) + self.r * (self.hidden + self.n)
        return SIZE * (factors + self.made + self.n)

    @property
    def minimum(self) -> int:
        """Each input once, each output once."""
        return SIZE * self.m * (self.k + self.n) + self.weights

    @property
    def tile(self) -> tiles.Tile:
        if not self.hidden:
            return tiles.linear_tile(self.m, self.r, LIKE)
        choose = tiles.gated_mlp_tile if self.gated else tiles.mlp_tile
        return choose(self.m, self.r, LIKE)

    @property
    def row_blocks(self) -> int:
        return triton.cdiv(self.m, self.tile.BLOCK_M)

    @property
    def apart(self) -> bool:
        """Whether x V is a launch of its own, by the library."""
        return tiles.takes_two_launches(self.m, self.k, self.r, LIKE)

    def shared_out(self, columns: int) -> int:
        """How many programs share the same rows and divide these columns, or hidden units."""
        share = tiles.columns_per_program(columns, self.tile.BLOCK_N, self.row_blocks)
        return triton.cdiv(columns, share)


@dataclass(frozen=True)
class Launch:
    """One launch: FLOPs, bytes of inputs and outputs, and bytes that programs request."""

    flops: int
    weights: int
    rows: int  # bytes of x and y
    requested: int
    programs: int
    workspace: int = 0  # bytes written for the next launch, or read from the last one


def product(m: int, k: int, n: int, widest: int, first: bool) -> Launch:
    """x W as a launch of its own; `first` if its result is for the next launch."""
    tile = tiles.matmul_tile(m, n, LIKE, widest)
    blocks, columns = triton.cdiv(m, tile.BLOCK_M), triton.cdiv(n, tile.BLOCK_N)
    bias = 0 if first else n
    x, w, y = SIZE * m * k, SIZE * (n * k + bias), SIZE * m * n
    rows, room = (x, y) if first else (y, x)
    return Launch(2 * m * k * n, w, rows, columns * x + blocks * w + y, blocks * columns, room)


def launches(shape: Shape) -> Iterator[Launch]:
    """All launches of a shape: x V if it is one, the fused kernel, and a split-k MLP's expansion.

    Programs that share rows each read x and V and compute x V, or each read x V.
    """
    m, blocks, r, n = shape.m, shape.row_blocks, shape.r, shape.n
    x, y, v, last = SIZE * m * shape.k, SIZE * m * n, SIZE * shape.k * r, SIZE * n * r
    middle = SIZE * m * r
    if shape.apart:
        yield product(m, shape.k, r, widest=64, first=True)
    if shape.apart and not shape.hidden:
        yield product(m, r, n, widest=128, first=False)
        return
    parts = shape.shared_out(shape.hidden or n)
    weights = shape.weights - (v if shape.apart else 0)
    read, room = (0, middle) if shape.apart else (x, 0)
    again = parts * middle if shape.apart else (parts - 1) * (x + blocks * v)
    flops = 2 * m * (weights // SIZE + (0 if shape.apart else (parts - 1) * shape.k * r))
    if not shape.hidden or parts == 1:
        asked = read + y + blocks * weights + again
        yield Launch(flops, weights, read + y, asked, blocks * parts, room)
        return
    out, sums = last + SIZE * n, 4 * parts * m * r
    tile = tiles.row_tile(m, r, LIKE, least=16)
    rows = triton.cdiv(m, tile.BLOCK_M)
    columns = triton.cdiv(n, tiles.columns_per_program(n, tile.BLOCK_N, rows))
    yield Launch(flops - 2 * m * out // SIZE, weights - out, read,
                 read + again + blocks * (weights - out) + sums, blocks * parts, room + sums)
    yield Launch(2 * m * out // SIZE + columns * parts * m * r, out, y,
                 y + rows * out + columns * sums, rows * columns, sums)


def moved(shape: Shape, cache: int) -> int:
    """Bytes between device memory and L2 cache.

    Every wave reads weights that do not fit into half of the cache. The workspace between launches
    is small and stays in the cache.
    """
    total = 0
    for one in launches(shape):
        waves = 1
        if one.weights + one.workspace > cache // 2:
            waves = triton.cdiv(one.programs, tiles.multiprocessors())
        total += one.rows + waves * one.weights
    return total


def workspace(shape: Shape) -> int:
    """Bytes that launches leave to each other, written and read."""
    return sum(one.workspace for one in launches(shape))


def moved_with_workspace(shape: Shape, cache: int) -> int:
    """`moved` plus the workspace, as if the cache kept nothing of it."""
    return moved(shape, cache) + workspace(shape)


def requested(shape: Shape) -> int:
    """Bytes that programs read from the cache or write."""
    return sum(one.requested for one in launches(shape))


def seconds(one: Launch, gpu: Gpu) -> float:
    """The time of a launch: the longest of arithmetic, memory, cache, and one processor's reads.

    The multiprocessor with the most programs decides, since the others wait for it.
    """
    processors = tiles.multiprocessors()
    waves = triton.cdiv(one.programs, processors)
    busy = one.programs / processors / waves  # the share of all processors that works
    return gpu.launch + max(
        one.flops / gpu.flops / busy,
        one.requested / gpu.cache / (busy if waves > 1 else 1),
        one.requested / one.programs * waves / gpu.processor,
        (one.rows + one.weights) / gpu.memory,
    )


def library(m: int, k: int, n: int, gpu: Gpu) -> float:
    """The time of a dense product with the best of a library's tiles, under the same roofline."""
    found = []
    for rows, columns, parts in LIBRARY:
        together = gpu.shared_tiles if columns == 256 else 1
        programs = parts * triton.cdiv(m, rows) * triton.cdiv(n, columns)
        reads = SIZE * programs * triton.cdiv(k, parts) * (rows + columns // together)
        writes = m * n * (SIZE if parts == 1 else 4 * parts)
        product = Launch(2 * m * k * n, SIZE * k * n, SIZE * m * (k + n), reads + writes, programs)
        total = seconds(product, gpu)
        if parts > 1:
            asked = m * n * (4 * parts + SIZE)
            total += seconds(Launch(0, 0, 0, asked, tiles.multiprocessors()), gpu)
        found.append(total)
    return min(found)


def dense(shape: Shape, gpu: Gpu) -> float:
    """The time of products with the dense weights; an MLP writes and reads its hidden layer."""
    if not shape.hidden:
        return library(shape.m, shape.k, shape.n, gpu)
    return (library(shape.m, shape.k, shape.made, gpu)
            + library(shape.m, shape.hidden, shape.n, gpu))


def products(shape: Shape, gpu: Gpu) -> float:
    """The time of the low-rank products one after the other, each result written and read."""
    pairs = [(shape.k, shape.r), (shape.r, shape.n)]
    if shape.hidden:
        pairs[1:] = [(shape.r, shape.made), (shape.hidden, shape.r), (shape.r, shape.n)]
    return sum(library(shape.m, k, n, gpu) for k, n in pairs)


def ours(shape: Shape, gpu: Gpu) -> float:
    return sum(seconds(one, gpu) for one in launches(shape))


def shapes() -> dict[str, Shape]:
    found = {}
    for model, d, r in (("DeiT-S", 384, 128), ("DeiT-B", 768, 128)):
        for batch in (1, 8, 64):
            m = 197 * batch
            found[f"{model} b{batch} proj"] = Shape(m, d, d, r)
            found[f"{model} b{batch} fc1"] = Shape(m, d, 4 * d, r)
            found[f"{model} b{batch} fc2"] = Shape(m, 4 * d, d, r)
            found[f"{model} b{batch} MLP"] = Shape(m, d, d, r, 4 * d)
            eva = model.replace("DeiT", "EVA-02")
            found[f"{eva} b{batch} gated MLP"] = Shape(m, d, d, r, 8 * d // 3, gated=True)
    return found


def moved_table() -> str:
    """BUDGETS.md's table of bytes moved relative to the minimum, without and with the workspace."""
    lines = ["| shape | GPU | minimum, KiB | moved / minimum | left, KiB | with what is left |",
             "|" + " --- |" * 6]
    for name, shape in shapes().items():
        for architecture, gpu in GPUS.items():
            with compiling_for(architecture):
                without, with_parts = (f(shape, gpu.cache_size) / shape.minimum
                                       for f in (moved, moved_with_workspace))
                lines.append(f"| {name} | {architecture} | {shape.minimum / 1024:.0f} | "
                             f"{without:.3f} | {workspace(shape) / 1024:.0f} | {with_parts:.3f} |")
    return "\n".join(lines)


def table() -> str:
    lines = ["| shape | GPU | rank | moved / minimum | launches | left, KiB | dense | products "
             "| ours |", "|" + " --- |" * 9]
    for name, shape in shapes().items():
        for architecture, gpu in GPUS.items():
            with compiling_for(architecture):
                ratio = moved(shape, gpu.cache_size) / shape.minimum
                times = [f(shape, gpu) * 1e6 for f in (dense, products, ours)]
                count, room = len([*launches(shape)]), workspace(shape) / 1024
                lines.append(f"| {name} | {architecture} | {shape.r} | {ratio:.3f} | {count} | "
                             f"{room:.0f} | " + " | ".join(f"{time:.1f}" for time in times) + " |")
    return "\n".join(lines)


TEXT = """# A roofline of the fused Triton kernels

Generated by `make gpu-reports`. The table predicts microseconds in 16 bits on an A100 (sm_80) and
an H100 (sm_90): "dense" for the dense weights, "products" for the low-rank products one after the
other, "ours" for the fused kernels. Dense and products take the best of a library's tiles.

Every launch costs one microsecond (an assumption, for CUDA graphs) plus the longest of four
times: arithmetic at the data sheet's peak, device memory, what all programs read from the L2
cache, and what the multiprocessor with the most programs reads from it. The model has no
activations, no tail of the last wave and no latency.

Measured on an H200 ([RESULTS.md](RESULTS.md)) all three take longer: the fused kernels took three
to six times the prediction when they first ran, and 1.2 to 2.4 times after tuning. A launch waits
3 to 4 microseconds for its first bytes, and the latency of the products is not hidden. The model
predicts the order of what is left to gain, and the bytes, which the emulator counts.

"Moved / minimum" covers inputs and outputs. "Left" is the workspace that one launch writes for
the next, x V or split-k partial sums of h V2, in KiB written and read. It counts as traffic of
the L2 cache, of which it takes at most a fifth. Ranks above 128 run as products one after the
other.

"""

if __name__ == "__main__":
    folder = ROOT / "bench" / "gpu"
    folder.mkdir(exist_ok=True)
    (folder / "ROOFLINE.md").write_text(TEXT + table() + "\n", encoding="utf-8")
