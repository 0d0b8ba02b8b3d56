"""Tile sizes by shape and architecture, computed by the rules below without any timing.

With `ADACOMCAT_AUTOTUNE=1` the launchers time neighbouring tiles on the first call of each shape.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

# Multiprocessors, and shared memory that a block can use (KiB), by architecture. The counts are
# constants instead of a query, so that split-k gives the same bits on every card of one kind.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170, "gfx942": 304}
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}

_tuned: dict[tuple, "Tile"] = {}


@dataclass(frozen=True)
class Tile:
    """A tile of BLOCK_M x BLOCK_N outputs and BLOCK_K steps of the sum, with warps and stages."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    def arguments(self, without: str | None = None) -> dict[str, int]:
        """The keyword arguments of a kernel launch, except the one named by `without`."""
        return {name: value for name, value in asdict(self).items() if name != without}


def enough_programs() -> int:
    """Half the number of multiprocessors, which suffice to saturate the L2 cache.

    50 multiprocessors at 64 bytes a clock read the 5 TB/s of an A100's or H100's L2 cache. More
    programs mean smaller tiles, which read more in total.
    """
    return max(1, multiprocessors() // 2)


def target() -> GPUTarget:
    """The architecture that kernels are compiled for at this moment."""
    return triton.runtime.driver.active.get_current_target()  # pyright: ignore[reportReturnType]


def on_amd() -> bool:
    return target().backend == "hip"


def multiprocessors() -> int:
    return MULTIPROCESSORS.get(target().arch, 108)


def padded(rank: int) -> int:
    """The rank rounded up to a power of two, and to at least 16 for tensor cores."""
    return max(16, triton.next_power_of_2(rank))


def precision(x: Tensor) -> str:
    """`input_precision` for tl.dot; it matters for float32 only.

    "tf32" if `torch.set_float32_matmul_precision` allows it. Otherwise "tf32x3": three tensor-core
    products of the operands' upper and lower halves, with relative errors below 1e-6. Products on
    scalar units ("ieee") would be an order of magnitude slower.
    """
    if x.dtype != torch.float32 or on_amd():
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def operand_bytes(x: Tensor) -> int:
    """Bytes of an operand's element on the chip; tf32x3 keeps both halves, 4 bytes each."""
    return 8 if precision(x) == "tf32x3" else x.element_size()


def warps(large: bool) -> int:
    """Eight warps for large tiles, else four; half as many on AMD, whose warps are twice as wide.

    With more threads each would load less than 16 bytes of a tile at a time.
    """
    return (8 if large else 4) // (2 if on_amd() else 1)


def registers(tile: Tile, blocks: int = 2, always: bool = False) -> dict[str, int]:
    """The option `maxnreg` that lets `blocks` blocks share a multiprocessor, for sm_100.

    Without it ptxas for sm_100 aims at more blocks and spills registers.

    Args:
        always: set it for every NVIDIA architecture, for kernels that spill there too.
    """
    if on_amd() or not (always or target().arch == 100):
        return {}
    return {"maxnreg": min(255, 65536 // (blocks * 32 * tile.num_warps))}


def stages(bytes_per_stage: int) -> int:
    """Pipeline stages: three, or fewer if they would fill more than half of the shared memory."""
    half = SHARED_KIB.get(target().arch, 64) * 512
    if on_amd():
        return 2  # shared memory is small, and AMD's pipeliner keeps the next tile in registers
    return 3 if 3 * bytes_per_stage <= half else 2 if 2 * bytes_per_stage <= half else 1


def row_tile(
    rows: int, rank: int, x: Tensor, factors: int = 1, least: int = 64, most: int = 128
) -> Tile:
    """The tile of kernels that keep (BLOCK_M, rank) in registers and stream the weights past it.

    Every program reads all weights of its columns, so more rows a program mean less traffic.
    BLOCK_M grows from 16 to `least`, and beyond while the programs exceed one wave, up to `most`.
    The register file bounds it at 32 KiB of operands (float32 sums of 16-bit operands take another
    64 KiB). Ranks are at most 128 (`is_wide`).

    Args:
        factors: how many weight matrices one loop reads.
        least: 64, the rows of a wgmma; 16 for kernels whose programs take all columns, since fewer
            rows a program then keep more multiprocessors busy.
        most: smaller for kernels that keep several blocks of rows.
    """
    width, size = padded(rank), operand_bytes(x)
    room = SHARED_KIB.get(target().arch, 64)  # KiB
    most = min(most, max(16, 32768 // (width * size)))
    rows_at_once = 16
    while rows_at_once < most and (
        rows_at_once < min(least, rows) or triton.cdiv(rows, rows_at_once) > multiprocessors()
    ):
        rows_at_once *= 2
    # A stage holds BLOCK_K or BLOCK_N rows of a factor: up to 32 KiB, or 16 KiB of a small memory.
    depth = max(16, min(64, (32768 if room > 100 else 16384) // (width * size)))
    large = rows_at_once * width > (4096 if on_amd() else 8192)
    row = x.element_size() * (factors * width + rows_at_once)  # bytes of one row of a stage
    # With a single stage operands stay in registers, and tf32 at rank 128 would spill.
    if precision(x) == "tf32" and stages(depth * row) == 1:
        depth = max(16, depth // 2)
    # Half as many warps if the tiles of x and y would have less than 16 bytes a thread.
    small = rows_at_once * depth * x.element_size() < 512 * warps(large) * (2 if on_amd() else 1)
    return Tile(
        rows_at_once, depth, depth, warps(large) // (2 if small else 1), stages(depth * row))


def linear_tile(rows: int, rank: int, x: Tensor) -> Tile:
    """`row_tile` for low_rank_linear; at most 64 rows for 16-bit types on sm_90.

    Several programs then share a multiprocessor, which was faster on an H200.
    """
    few = target().arch == 90 and x.element_size() == 2
    return row_tile(rows, rank, x, most=64 if few else 128)


def mlp_tile(rows: int, rank: int, x: Tensor) -> Tile:
    """The tile of low_rank_mlp; for 16-bit types on sm_90 the fastest of a sweep on an H200.

    For one image 16 rows were fastest, with mma instead of wgmma. Tiles of 128 rows were fastest
    where tiles of 64 are more than one wave: each program reads all weights from the L2 cache.
    """
    if target().arch != 90 or x.element_size() != 2:
        return row_tile(rows, rank, x, factors=2)
    if 6 * triton.cdiv(rows, 16) <= multiprocessors():
        return Tile(16, 128, 128, 4, 2)
    if triton.cdiv(rows, 64) <= multiprocessors():
        return Tile(64, 64, 64, 4, 3)
    return Tile(128, 64, 128, 8, 3)


def gated_mlp_tile(rows: int, rank: int, x: Tensor) -> Tile:
    """`mlp_tile` with half as many hidden units at a time, since each takes two products.

    Exact products keep both halves of their operands in registers, and spill beyond 16 rows.
    """
    exact = operand_bytes(x) == 8
    tile = row_tile(rows, rank, x, factors=3, most=16) if exact else mlp_tile(rows, rank, x)
    return replace(tile, BLOCK_N=max(16, tile.BLOCK_N // 2))


def is_wide(rank: int) -> bool:
    """Whether a rank is too wide for the registers: above 128.

    In tf32x3 both halves of the operands would fill the register file. In 16-bit types only one
    program would fit on a multiprocessor, and two plain products were faster on an H200.
    """
    return padded(rank) > 128


def takes_two_launches(rows: int, inner: int, rank: int, x: Tensor) -> bool:
    """Whether x V is a launch of its own, written and read again, instead of kept in registers.

    With few rows several programs share them, and each of them reads V, (inner, rank), and computes
    x V again. Above 128 KiB of V that takes longer than a launch: a multiprocessor reads about 100
    bytes a nanosecond.
    """
    if is_wide(rank):
        return True
    few = 2 * triton.cdiv(rows, 64) < multiprocessors()
    return few and inner * rank * x.element_size() > 131072


def matmul_tile(rows: int, columns: int, x: Tensor, widest: int = 128) -> Tile:
    """The tile of a plain product (rows, columns): the largest one with `enough_programs`.

    It has at most 64 rows for 16-bit types on sm_90: several programs then share a multiprocessor,
    which was faster on an H200. Tiles of 128 x 256 were not faster there.
    """
    size = operand_bytes(x)
    depth = 128 // size
    sizes = [(128, widest), (128, 64), (64, 64), (32, 64), (32, 32), (16, 32)]
    if target().arch == 90 and x.element_size() == 2:
        sizes[:2] = [(64, widest)]
    if on_amd():
        sizes.pop()  # each of its 128 threads would have less than 16 bytes of the smallest tile
    busy = ((m, n) for m, n in sizes
            if triton.cdiv(rows, m) * triton.cdiv(columns, n) >= enough_programs())
    rows_at_once, columns_at_once = next(busy, sizes[-1])
    # At least 16 bytes of the smaller tile for each of 128 threads.
    depth = max(depth, 2048 // (rows_at_once * x.element_size()))
    stage = depth * size * (rows_at_once + columns_at_once)
    count = warps(rows_at_once * columns_at_once * max(size, 4) > 32768)
    return Tile(rows_at_once, depth, columns_at_once, count, stages(stage))


def pair_tile(rows: int, columns: int, x: Tensor, widest: int = 64) -> Tile:
    """The tile of kernels that multiply x by two weights at once, BLOCK_N columns of each.

    Args:
        columns: of both weights together.
        widest: columns of one weight beyond which a program has nothing to do.
    """
    # Exact products keep both halves of their operands in registers.
    tile = matmul_tile(rows, columns, x, widest=128 if x.element_size() == 2 else 64)
    columns_at_once = max(16, min(tile.BLOCK_N // 2, padded(widest)))
    # At least 16 bytes of the smallest tile for each thread.
    threads = tile.num_warps * (64 if on_amd() else 32)
    least = 16 * threads // (min(columns_at_once, tile.BLOCK_M) * x.element_size())
    depth = max(tile.BLOCK_K, least)
    stage = depth * operand_bytes(x) * (tile.BLOCK_M + 2 * columns_at_once)
    return replace(tile, BLOCK_N=columns_at_once, BLOCK_K=depth, num_stages=stages(stage))


def reduction_tile(rows: int, rank: int, x: Tensor, reads_columns: bool = True) -> Tile:
    """The tile of sums over rows: a program adds BLOCK_M rows at a time to (BLOCK_N, rank).

    Args:
        reads_columns: whether the kernel reads tiles (BLOCK_M, BLOCK_N) beside (BLOCK_M, rank).
    """
    width, size = padded(rank), operand_bytes(x)
    # tf32x3 keeps both halves of its operands in registers, and AMD's compiler keeps the next
    # tiles there. Both spill unless BLOCK_N is halved.
    doubled = 2 if size == 8 or on_amd() else 1
    columns = max(16, min(64, 8192 // (width * doubled)))
    depth = max(16, min(64, 16384 // (width * size)))
    large = columns * width > 4096
    # Half as many warps if a tile (BLOCK_M, BLOCK_N) would have less than 16 bytes a thread.
    threads = 32 * warps(large) * (2 if on_amd() else 1)
    count = warps(large) // (2 if reads_columns and depth * columns * size < 16 * threads else 1)
    return Tile(depth, depth, columns, count, stages(depth * size * (width + columns)))


def attention_tile(tokens: int, heads: int, rank: int, x: Tensor) -> Tile:
    """The tile of attention: BLOCK_M queries of a head, BLOCK_N keys at a time.

    Args:
        heads: the images times the heads of each.
    """
    width, size = padded(rank), operand_bytes(x)
    queries, most = 16, 16 if size == 8 else 64
    if on_amd():
        queries = most = 32  # with fewer, each of the 128 threads has less than 16 bytes of a tile
    while queries < most and heads * triton.cdiv(tokens, queries) > multiprocessors():
        queries *= 2
    keys = max(16, min(64, 8192 // (width * size)))
    return Tile(queries, width, keys, warps(False), stages(2 * keys * width * size))


def splits(rows: int, block: int, programs: int) -> int:
    """Splits of a sum over rows: up to two waves of programs, and at least 4 tiles a split.

    It depends on the shape and the architecture only, so that results repeat bit for bit.
    """
    wanted = triton.cdiv(2 * multiprocessors(), max(programs, 1))
    return max(1, min(wanted, rows // (4 * block)))


def columns_per_program(columns: int, block: int, programs: int) -> int:
    """Columns, or hidden units, of each of the programs that share the same rows; whole blocks.

    The columns are divided until all multiprocessors are busy, among at most 12 programs: each of
    them computes x V again, and an MLP adds up one partial sum of each.

    Args:
        programs: the number of blocks of rows.
    """
    sharing = min(12, max(1, multiprocessors() // max(programs, 1)))
    return max(1, triton.cdiv(triton.cdiv(columns, sharing), block)) * block


def best(tile: Tile, key: tuple, x: Tensor, run: Callable[[Tile], object]) -> Tile:
    """`tile`, or with ADACOMCAT_AUTOTUNE=1 the fastest of its neighbours in `run` on the GPU."""
    if os.environ.get("ADACOMCAT_AUTOTUNE", "0") in ("", "0") or not x.is_cuda:
        return tile
    key = (*key, x.dtype, target())
    if key not in _tuned:
        _tuned[key] = min(_neighbours(tile), key=lambda candidate: _milliseconds(run, candidate))
    return _tuned[key]


def _neighbours(tile: Tile) -> list[Tile]:
    """The tile, and the tiles that differ in one field: half, twice, or a stage more or less."""
    found = [tile]
    for name, value in asdict(tile).items():
        for other in (value // 2, value * 2) if name != "num_stages" else (value - 1, value + 1):
            least, most = {"num_warps": (1, 8), "num_stages": (1, 5)}.get(name, (16, 128))
            if least <= other <= most:
                found.append(replace(tile, **{name: other}))
    return found


def _milliseconds(run: Callable[[Tile], object], tile: Tile) -> float:
    try:
        return float(triton.testing.do_bench(lambda: run(tile)))  # pyright: ignore
    except triton.runtime.errors.OutOfResources:
        return float("inf")
