"""Which fused ops run in Triton on a GPU that nobody measured: a roofline decides.

An op is chosen where the fused kernel is predicted to be faster than the same ranks in PyTorch's
own launches by more than a tenth, in the geometric mean over DeiT-S and DeiT-B at 1, 8 and 64
images, and slower at none. The bandwidth of an L2 cache is in no data sheet, so this must hold at
half and at twice the assumed one as well.

`make gpu-reports` runs it; it writes bench/gpu/CHOICE.md. tests/gpu/triton/test_choice.py compares
the decisions with adacomcat/ops/backends.py.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import triton
from gpu_traffic import LIKE, SIZE, Gpu, Launch, Shape, launches, library, product, seconds
from stub_driver import compiling_for

from adacomcat.kernels import tiles  # pyright: ignore[reportMissingImports]  (it lies in kernels/)

ROOT = Path(__file__).parents[1]
MARGIN = 1.1
# Measured on the H200: a sublayer of three launches at one image takes 12.3 microseconds, one of
# seven 20.5 (bench/gpu/RESULTS.md).
LAUNCH = 3e-6
# What of an assumed bandwidth of an L2 cache may be true.
DOUBTS = (0.5, 1.0, 2.0)
# Data sheets: FLOPs in 16 bits with float32 sums and without sparsity, and memory. Assumed: the L2
# bandwidths of all but the first and fourth; 64 bytes a clock for each multiprocessor.
CARDS = {
    "sm_80": ("A100 SXM 80 GB", Gpu(312e12, 2.04e12, 5.0e12, 90e9, 40 << 20, 1, LAUNCH)),
    "sm_86": ("RTX A6000", Gpu(154.8e12, 768e9, 2.5e12, 115e9, 6 << 20, 1, LAUNCH)),
    "sm_89": ("L40S", Gpu(362e12, 864e9, 4.0e12, 161e9, 96 << 20, 1, LAUNCH)),
    "sm_90": ("H200", Gpu(989e12, 4.8e12, 5.5e12, 112e9, 50 << 20, 2, LAUNCH)),
    "sm_120": ("RTX 5090", Gpu(209.5e12, 1.79e12, 5.0e12, 154e9, 96 << 20, 1, LAUNCH)),
}


class Block(NamedTuple):
    """A compressed block of a vision transformer and the rows that it gets."""

    name: str
    batch: int
    d: int
    heads: int
    rank: int  # of the MLP
    head_rank: int = 32
    tokens: int = 197

    @property
    def m(self) -> int:
        return self.batch * self.tokens


BLOCKS = [Block(f"{name} b{batch}", batch, d, heads, rank)
          for name, d, heads, rank in (("DeiT-S", 384, 6, 128), ("DeiT-B", 768, 12, 256))
          for batch in (1, 8, 64)]


def measured(op: str) -> list[float]:
    """PyTorch's microseconds over ours for each of BLOCKS on the H200, from RESULTS.md."""
    name = {"low_rank_mlp": "MLP", "low_rank_attention": "attention"}[op]
    lines = (ROOT / "bench" / "gpu" / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    found = {f"{row[2]} b{row[3]}": float(row[5]) / float(row[4])
             for row in cells if len(row) == 11 and row[1] == name}
    return [found[block.name] for block in BLOCKS]


def elementwise(elements: int, tensors: int) -> Launch:
    """A launch that reads or writes `tensors` tensors of so many elements."""
    moved = SIZE * elements * tensors
    return Launch(0, 0, moved, moved, 8 * tiles.multiprocessors())


def norm(block: Block) -> Launch:
    return elementwise(block.m * block.d, 2)


def residual(block: Block) -> Launch:
    return elementwise(block.m * block.d, 3)


def attention(block: Block, queries: int) -> Launch:
    """softmax(q kᵀ) v of all heads; each program has `queries` queries of one head."""
    heads, n, rank = block.batch * block.heads, block.tokens, tiles.padded(block.head_rank)
    programs = heads * triton.cdiv(n, queries)
    rows = SIZE * 4 * heads * n * rank
    return Launch(4 * heads * n * n * rank, 0, rows,
                  rows // 2 + programs * 2 * SIZE * n * rank, programs)


def total(gpu: Gpu, *apart: Launch) -> float:
    return sum(seconds(one, gpu) for one in apart)


def mlp_of_torch(block: Block, gpu: Gpu) -> float:
    """Layer norm, four products, GELU and residual, a launch each."""
    m, d, h, r = block.m, block.d, 4 * block.d, block.rank
    gelu = elementwise(m * h, 2)
    return total(gpu, norm(block), gelu, residual(block)) + sum(
        library(m, k, n, gpu) for k, n in ((d, r), (r, h), (h, r), (r, d)))


def mlp_of_ours(block: Block, gpu: Gpu) -> float:
    """The fused kernel; for wide ranks four products with GELU and residual inside."""
    m, d, r = block.m, block.d, block.rank
    shape = Shape(m, d, d, min(r, 128), 4 * d)
    if not tiles.is_wide(r):
        apart = [norm(block)] if shape.apart else []
        return total(gpu, *apart, *launches(shape))
    out = [product(m, r, n, widest=128, first=False) for n in (4 * d, d)]
    return (total(gpu, norm(block), *out)
            + library(m, d, r, gpu) + library(m, 4 * d, r, gpu))


def attention_of_torch(block: Block, gpu: Gpu) -> float:
    """Layer norm, one product for q, k and v, attention, the output's product and the residual."""
    width = block.heads * block.head_rank
    return (total(gpu, norm(block), attention(block, 64), residual(block))
            + library(block.m, block.d, 3 * width, gpu) + library(block.m, width, block.d, gpu))


def attention_of_ours(block: Block, gpu: Gpu) -> float:
    """The same, with the residual inside the output's product, a kernel of our own."""
    width = block.heads * block.head_rank
    tile = tiles.attention_tile(block.tokens, block.batch * block.heads, block.head_rank, LIKE)
    out = product(block.m, width, block.d, widest=128, first=False)
    return (total(gpu, norm(block), attention(block, tile.BLOCK_M), out)
            + library(block.m, block.d, 3 * width, gpu))


def linear_of_torch(block: Block, gpu: Gpu) -> float:
    """The two products of a lone layer, the MLP's first one without its GELU."""
    return (library(block.m, block.d, block.rank, gpu)
            + library(block.m, block.rank, 4 * block.d, gpu))


def linear_of_ours(block: Block, gpu: Gpu) -> float:
    m, d, r = block.m, block.d, block.rank
    if tiles.is_wide(r):
        return library(m, d, r, gpu) + total(gpu, product(m, r, 4 * d, widest=128, first=False))
    return total(gpu, *launches(Shape(m, d, 4 * d, r)))


MEASURED = ("low_rank_mlp", "low_rank_attention")
OPS = {
    "low_rank_mlp": (mlp_of_torch, mlp_of_ours),
    "low_rank_attention": (attention_of_torch, attention_of_ours),
    "low_rank_linear": (linear_of_torch, linear_of_ours),
}


def gains(op: str, architecture: str, doubt: float = 1.0) -> list[float]:
    """PyTorch's time over ours for each of BLOCKS, with the L2 cache `doubt` times as fast."""
    of_torch, of_ours = OPS[op]
    gpu = CARDS[architecture][1]
    gpu = replace(gpu, cache=doubt * gpu.cache)
    with compiling_for(architecture):
        return [of_torch(block, gpu) / of_ours(block, gpu) for block in BLOCKS]


def mean(found: list[float]) -> float:
    return math.exp(sum(map(math.log, found)) / len(found))


def chosen(op: str, architecture: str) -> bool:
    """Whether the fused kernel is to run by default."""
    every = [gains(op, architecture, doubt) for doubt in DOUBTS]
    return all(mean(found) > MARGIN and min(found) >= 1.0 for found in every)


def rows() -> Iterator[list[str]]:
    for op in OPS:
        for architecture, (name, _) in CARDS.items():
            found = gains(op, architecture)
            means = [f"{mean(gains(op, architecture, doubt)):.2f}" for doubt in DOUBTS]
            yield [f"`{op}`", f"{architecture}, {name}", *(f"{gain:.2f}" for gain in found),
                   " / ".join(means), "Triton" if chosen(op, architecture) else "PyTorch"]


def table() -> str:
    header = ["op", "card", *(block.name for block in BLOCKS), "mean at ½, 1, 2", "default"]
    lines = [header, ["---"] * len(header), *rows()]
    for op in MEASURED:
        found = measured(op)
        lines.append([f"`{op}`", "H200, measured", *(f"{gain:.2f}" for gain in found),
                      f"{mean(found):.2f}", ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TEXT = """# Which fused ops run in Triton on GPUs that were not measured

Generated by `make gpu-reports`. Each number is a predicted ratio in 16 bits: the time of the same
ranks in PyTorch's own launches over that of the fused kernel, both by the roofline of
`tools/gpu_traffic.py` with three microseconds for each launch, as on the H200. The ops are
x + f(norm(x)) of a block with 197 tokens: DeiT-S with ranks 32 and 128, DeiT-B with 32 and 256;
`low_rank_linear` is the MLP's first layer alone, without its activation.

A fused op is the default where the mean gain is above a tenth and no size is predicted to lose.
Data sheets do not give the bandwidth of an L2 cache, so both must hold at half and at twice the
assumed one.

The last rows are the same ratios as an H200 measured them ([RESULTS.md](RESULTS.md)), with CUDA
graphs: what this prediction is worth. It is too careful there, since it gives PyTorch's products
the best tiles. `adacomcat doctor --measure` on the card itself overrides it.

"""

if __name__ == "__main__":
    (ROOT / "bench" / "gpu" / "CHOICE.md").write_text(TEXT + table() + "\n", encoding="utf-8")
