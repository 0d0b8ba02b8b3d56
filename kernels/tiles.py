"""Tile sizes by shape and architecture: a small table with its reasons, nothing is timed.

`ADACOMCAT_AUTOTUNE=1` times the candidates on the first call of each shape instead.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import triton
from torch import Tensor

# Multiprocessors and usable shared memory (KiB a block) by architecture. The counts are constants
# and not what the device reports, so that sums are split the same way on every card of one kind.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170, "gfx942": 304}
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}

_tuned: dict[tuple, "Tile"] = {}


@dataclass(frozen=True)
class Tile:
    """BLOCK_M rows, BLOCK_K of the inner and BLOCK_N of the outer dimension, warps and stages."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    def arguments(self, without: str | None = None) -> dict[str, int]:
        """The keyword arguments of a kernel; `without` names one that it does not take."""
        return {name: value for name, value in asdict(self).items() if name != without}


def enough_programs() -> int:
    """Half as many as there are processors: those can take all that the cache gives.

    64 bytes a clock for each of 50 are the 5 TB/s of an A100's or H100's cache. More programs of
    one launch have smaller tiles, read more between them, and are no faster for it.
    """
    return max(1, multiprocessors() // 2)


def target() -> triton.backends.compiler.GPUTarget:
    """The architecture that kernels are compiled for at this moment."""
    return triton.runtime.driver.active.get_current_target()


def on_amd() -> bool:
    return target().backend == "hip"


def multiprocessors() -> int:
    return MULTIPROCESSORS.get(target().arch, 108)


def padded(rank: int) -> int:
    """The power of two that holds a rank; tensor cores want at least 16."""
    return max(16, triton.next_power_of_2(rank))


def precision(x: Tensor) -> str:
    """How float32 products are taken; 16-bit products are exact in float32 anyway.

    tf32 if torch may use it (`torch.set_float32_matmul_precision`). Otherwise tf32x3: three
    tensor-core products of the operands' upper and lower halves, within 1e-6 of exact, where
    the exact product of scalar units would be an order of magnitude slower.
    """
    if x.dtype != torch.float32 or on_amd():
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def operand_bytes(x: Tensor) -> int:
    """What an element takes on the chip: both its halves where a product is taken as three."""
    return 8 if precision(x) == "tf32x3" else x.element_size()


def warps(large: bool) -> int:
    """Eight for large tiles, else four; half of AMD's, which are twice as wide.

    More threads than a tile has 16 bytes would load less than that at a time.
    """
    return (8 if large else 4) // (2 if on_amd() else 1)


def registers(tile: Tile, blocks: int = 2, always: bool = False) -> dict[str, int]:
    """What leaves room for `blocks`; left to itself ptxas for sm_100 aims at more, and spills.

    `always`: where it does so for other NVIDIA architectures too.
    """
    if on_amd() or not (always or target().arch == 100):
        return {}
    return {"maxnreg": min(255, 65536 // (blocks * 32 * tile.num_warps))}


def stages(bytes_per_stage: int) -> int:
    """Loads in flight: three, or fewer where they would take over half of the shared memory."""
    half = SHARED_KIB.get(target().arch, 64) * 512
    if on_amd():
        return 2  # LDS is small, and AMD's pipeliner keeps the next tile in registers
    return 3 if 3 * bytes_per_stage <= half else 2 if 2 * bytes_per_stage <= half else 1


def row_tile(
    rows: int, rank: int, x: Tensor, factors: int = 1, least: int = 64, most: int = 128
) -> Tile:
    """Kernels that keep (BLOCK_M, rank) on the chip and stream all weights past it.

    Every program reads all weights of its columns, so the more rows it has the better, and 64 are
    what a wgmma takes; more where they would be more than one wave. Kernels whose programs do not
    share out columns have `least` 16: fewer rows a program keep more processors busy. The upper
    bound is the register file: 32 KiB of operands, of which the sums in float32 take twice as much
    for 16 bits. Ranks are at most 128 (`is_wide`). `factors` are read at a time; `most` rows are
    for kernels that keep more.
    """
    width, size = padded(rank), operand_bytes(x)
    room = SHARED_KIB.get(target().arch, 64)  # KiB
    most = min(most, max(16, 32768 // (width * size)))
    rows_at_once = 16
    while rows_at_once < most and (
        rows_at_once < min(least, rows) or triton.cdiv(rows, rows_at_once) > multiprocessors()
    ):
        rows_at_once *= 2
    # A stage holds (BLOCK_K or BLOCK_N) rows of a factor: 32 KiB of it, or what memory allows.
    depth = max(16, min(64, (32768 if room > 100 else 16384) // (width * size)))
    large = rows_at_once * width > (4096 if on_amd() else 8192)
    row = x.element_size() * (factors * width + rows_at_once)  # of a stage
    # With no load in flight operands stay in registers, of which rank 128 leaves too few with tf32.
    if precision(x) == "tf32" and stages(depth * row) == 1:
        depth = max(16, depth // 2)
    # Half as many warps where the tiles of x and y would have less than 16 bytes a thread.
    small = rows_at_once * depth * x.element_size() < 512 * warps(large) * (2 if on_amd() else 1)
    return Tile(
        rows_at_once, depth, depth, warps(large) // (2 if small else 1), stages(depth * row))


def linear_tile(rows: int, rank: int, x: Tensor) -> Tile:
    """Of a linear layer's forward pass: on sm_90 several programs of 16-bit types a processor."""
    few = target().arch == 90 and x.element_size() == 2
    return row_tile(rows, rank, x, most=64 if few else 128)


def mlp_tile(rows: int, rank: int, x: Tensor) -> Tile:
    """Of the MLP's forward pass; for 16-bit types on sm_90 what an H200 was fastest with.

    There tiles of few rows, on tensor cores that do not want 64, are best for one image, and tiles
    of 128 where there is more than a wave of 64: each program's weights come from the cache.
    """
    if target().arch != 90 or x.element_size() != 2:
        return row_tile(rows, rank, x, factors=2)
    if 6 * triton.cdiv(rows, 16) <= multiprocessors():
        return Tile(16, 128, 128, 4, 2)
    if triton.cdiv(rows, 64) <= multiprocessors():
        return Tile(64, 64, 64, 4, 3)
    return Tile(128, 64, 128, 8, 3)


def is_wide(rank: int) -> bool:
    """Whether a rank is too wide to be kept on the chip.

    Exact float32 keeps both halves of its operands: above 128 these alone would fill the registers.
    A kernel for 16 bits has one program a processor left: two products, that take the rank a few
    columns at a time, were faster on an H200.
    """
    return padded(rank) > 128


def takes_two_launches(rows: int, inner: int, rank: int, x: Tensor) -> bool:
    """Whether x V is a product of its own, written and read again, instead of kept on the chip.

    With few rows several programs share them, and each would read V, (inner, rank), and compute
    x V again. From 128 KiB on that takes longer than a launch: a processor reads a hundred bytes a
    nanosecond.
    """
    if is_wide(rank):
        return True
    few = 2 * triton.cdiv(rows, 64) < multiprocessors()
    return few and inner * rank * x.element_size() > 131072


def product_tile(rows: int, columns: int, x: Tensor, widest: int = 128) -> Tile:
    """Plain products (rows, columns): the largest tile that still keeps enough processors busy.

    On sm_90 and of 16 bits at most 64 rows, several of which share a processor: faster on an H200,
    where tiles of 128 x 256 were no faster either.
    """
    size = operand_bytes(x)
    depth = 128 // size
    sizes = [(128, widest), (128, 64), (64, 64), (32, 64), (32, 32), (16, 32)]
    if target().arch == 90 and x.element_size() == 2:
        sizes[:2] = [(64, widest)]
    # Of the smallest, AMD's 128 threads would have less than 16 bytes each.
    for rows_at_once, columns_at_once in sizes[:-1] if on_amd() else sizes:
        programs = triton.cdiv(rows, rows_at_once) * triton.cdiv(columns, columns_at_once)
        if programs >= enough_programs():
            break
    # At least 16 bytes of the smaller tile for each of 128 threads.
    depth = max(depth, 2048 // (rows_at_once * x.element_size()))
    stage = depth * size * (rows_at_once + columns_at_once)
    count = warps(rows_at_once * columns_at_once * max(size, 4) > 32768)
    return Tile(rows_at_once, depth, columns_at_once, count, stages(stage))


def reduction_tile(rows: int, rank: int, x: Tensor, reads_columns: bool = True) -> Tile:
    """Sums over rows of (BLOCK_N, rank): BLOCK_M rows at a time, BLOCK_N output rows a program.

    `reads_columns`: tiles (BLOCK_M, BLOCK_N) are read as well, not only (BLOCK_M, rank).
    """
    width, size = padded(rank), operand_bytes(x)
    # Exact float32 holds both halves of its operands in registers, and AMD's compiler the tiles
    # that come next: half the columns, no spills.
    doubled = 2 if size == 8 or on_amd() else 1
    columns = max(16, min(64, 8192 // (width * doubled)))
    depth = max(16, min(64, 16384 // (width * size)))
    large = columns * width > 4096
    # Half as many warps where such a tile would have less than 16 bytes a thread.
    threads = 32 * warps(large) * (2 if on_amd() else 1)
    count = warps(large) // (2 if reads_columns and depth * columns * size < 16 * threads else 1)
    return Tile(depth, depth, columns, count, stages(depth * size * (width + columns)))


def attention_tile(tokens: int, heads: int, rank: int, x: Tensor) -> Tile:
    """Queries (BLOCK_M) against all keys, BLOCK_N at a time, for batch times `heads` heads."""
    width, size = padded(rank), operand_bytes(x)
    queries, most = 16, 16 if size == 8 else 64
    if on_amd():
        queries = most = 32  # fewer leave less than 16 bytes of a tile to each of its 128 threads
    while queries < most and heads * triton.cdiv(tokens, queries) > multiprocessors():
        queries *= 2
    keys = max(16, min(64, 8192 // (width * size)))
    return Tile(queries, width, keys, warps(False), stages(2 * keys * width * size))


def splits(rows: int, block: int, programs: int) -> int:
    """Into how many parts a sum over rows is split: two waves of programs, 4 tiles a part or more.

    A function of the shape and the architecture only, so that a result can be repeated.
    """
    wanted = triton.cdiv(2 * multiprocessors(), max(programs, 1))
    return max(1, min(wanted, rows // (4 * block)))


def columns_per_part(columns: int, block: int, programs: int) -> int:
    """How many columns, in whole blocks, each of the programs writes that share the same rows.

    As many as keep all processors busy. What a program does before, it does once for each, and an
    MLP adds up a part from each, so they are a dozen at most.
    """
    parts = min(12, max(1, multiprocessors() // max(programs, 1)))
    return max(1, triton.cdiv(triton.cdiv(columns, parts), block)) * block


def best(tile: Tile, key: tuple, x: Tensor, run: Callable[[Tile], object]) -> Tile:
    """The table's tile, or with ADACOMCAT_AUTOTUNE=1 the fastest of its neighbours, measured."""
    if os.environ.get("ADACOMCAT_AUTOTUNE", "0") in ("", "0") or not x.is_cuda:
        return tile
    key = (*key, x.dtype, target())
    if key not in _tuned:
        _tuned[key] = min(_neighbours(tile), key=lambda candidate: _milliseconds(run, candidate))
    return _tuned[key]


def _neighbours(tile: Tile) -> list[Tile]:
    """The tile, and those with half or twice of one of its sizes."""
    found = [tile]
    for name, value in asdict(tile).items():
        for other in (value // 2, value * 2) if name != "num_stages" else (value - 1, value + 1):
            least, most = {"num_warps": (1, 8), "num_stages": (1, 5)}.get(name, (16, 128))
            if least <= other <= most:
                found.append(replace(tile, **{name: other}))
    return found


def _milliseconds(run: Callable[[Tile], object], tile: Tile) -> float:
    try:
        return triton.testing.do_bench(lambda: run(tile))
    except triton.runtime.errors.OutOfResources:
        return float("inf")
