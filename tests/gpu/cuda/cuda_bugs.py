"""Bugs to seed into csrc/cuda, and the cheapest check that notices each."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import cuda_calls
import cuda_cases
import torch
from cuda_host import CUDA, Failed, Host
from cuda_ptx import Emulated
from helpers.matrices import check
from kernel_cases import Case
from ptx.memory import Fault
from ptx.mutations import KINDS
from ptx.parser import Kernel
from test_cuda_low_rank_linear import complaints, draw

from adacomcat.ops import reference

SVD, LINEAR, TILES, BLOCKS, CHAIN, MLP, ATTENTION, PROJECT, ERRORS = (
    "batched_svd.cu", "low_rank_linear.cu", "tiles.cuh", "blocks.cuh", "chain.cuh",
    "low_rank_mlp.cu", "low_rank_attention.cu", "project.cu", "truncation_errors.cu")
# `plain` compares results in two orders of execution; the others add a sanitizer's reports.
CHECKS = ("plain", "asan", "tsan")


@dataclass(frozen=True)
class Bug:
    """`sources` replace the first `old` after the text `after` by `new`; `check` notices it."""

    name: str
    file: str
    old: str
    new: str = ""
    after: str = ""
    check: str = "plain"
    multiprocessors: int = 132  # with one, tiles are large
    op: str = ""  # whose results are compared, where the file does not tell

    def sources(self) -> dict[str, str]:
        text = (CUDA / self.file).read_text()
        before, after, rest = text.partition(self.after) if self.after else ("", "", text)
        if after != self.after or self.old not in rest:
            raise ValueError(f"{self.file} has nothing to change for: {self.name}")
        changed = before + after + rest.replace(self.old, self.new, 1)
        return {self.file: changed}


SYNC, STEP, WAIT = "    sync();\n", "    __syncthreads();\n", "    wait_for_copies<stages - 2>();\n"
BUGS = [
    Bug("no barrier after a round of rotations", SVD, SYNC, check="tsan",
        after="rotated |= rotate_round(round, tolerance);\n    "),
    Bug("no barrier after scaling", SVD, SYNC, check="tsan", after="first * second;\n"),
    Bug("no barrier before slots are read", SVD, SYNC, after="slots[thread / kWarp] = value;\n"),
    Bug("no barrier after lengths", SVD, SYNC, check="tsan", after="value / length : T(0);\n"),
    Bug("no barrier after the order", SVD, SYNC, check="tsan", after="order[place] = column;\n"),
    Bug("a column is filled while it is read", SVD, SYNC, check="tsan", after="row : least;\n"),
    Bug("no barrier after weights", SVD, SYNC, check="tsan", after="signs[q] = weight;\n"),
    Bug("no barrier after signs", SVD, SYNC, check="tsan", after="T(-1) : T(1);\n"),
    Bug("idle groups read the last column", SVD, "dot(column, column, column < n)",
        "dot(min(column, n - 1), min(column, n - 1), true)", check="tsan"),
    Bug("rotation the wrong way", SVD, "sine = tangent * cosine", "sine = -tangent * cosine"),
    Bug("V is not rotated", SVD, "rotate(v + low", "if (p.count < 0) rotate(v + low"),
    Bug("a pair is left out of each round", SVD, "place < players / 2", "place + 1 < players / 2"),
    Bug("the odd player has a partner", SVD, "high < n, tolerance", "high <= n, tolerance"),
    Bug("lanes pass the end of a column", SVD, "i < length; i +=", "i <= length; i +="),
    Bug("sorted upwards", SVD, "values[other] > values[column]", "values[other] < values[column]"),
    Bug("equal values share a place", SVD, "other < column)", "false)"),
    Bug("zero columns are left as they are", SVD, "if (values[column] > 0) return;", "return;"),
    Bug("NaN is not looked for", SVD, "fabs(value) <= kLargest ?", "!(fabs(value) > kLargest) ?"),
    Bug("the scale is not undone", SVD, "ldexp(values[order[i]], exponent)", "values[order[i]]"),
    Bug("signs of the wrong vectors", SVD, "if (wide)", "if (!wide)"),
    Bug("one matrix too many", SVD, "index < problem.count", "index <= problem.count",
        check="asan"),
    Bug("no barrier before a product", TILES, "  __syncthreads();\n", check="tsan",
        after="void pipeline(int steps, Load load, Use use) {\n"),
    Bug("no barrier in a step", TILES, STEP, after=WAIT),
    Bug("no wait for copies", TILES, WAIT),
    Bug("a wait that leaves a group in flight", TILES, "<stages - 2>", "<stages - 1>",
        after="step < steps; ++step"),
    Bug("a stage is loaded while it is used", TILES, "next = stages - 1", "next = 0"),
    Bug("no barrier before results go out", TILES, "  __syncthreads();\n", check="tsan",
        after="void drain("),
    Bug("no barrier before results are read", TILES, "    __syncwarp();\n"),
    Bug("no barrier after results are read", TILES, "__syncwarp();\n", ";\n", check="tsan",
        after="warp_column<Tile>() + column, values);\n", multiprocessors=1),
    Bug("one row too many", TILES, "row + r < from.rows", "row + r <= from.rows", check="asan"),
    Bug("columns are masked too late", TILES, "c < from.columns", "c < from.columns + 8"),
    Bug("16 bytes off their alignment", TILES, "stride % chunk == 0 &&", "true &&"),
    Bug("a row ends inside 16 bytes", TILES, "columns % chunk == 0;", "true;"),
    Bug("halves of the left operand exchanged", TILES, "lane / 16 *", "(1 - lane / 16) *",
        after="load_matrices(a[i].word"),
    Bug("V is not transposed", TILES, "load_transposed(operand", "load_matrices(operand"),
    Bug("float32 without what is left of it", TILES, "multiply_tf32(step, lhs.rest",
        "if (first > 9) multiply_tf32(step, lhs.rest"),
    Bug("float32 summed by tensor cores alone", TILES, "multiply_tf32(step, lhs.word, rhs.word",
        "multiply_tf32(sums, lhs.word, rhs.word"),
    Bug("rows of the result are not masked", BLOCKS, "row >= rows || ", check="asan"),
    Bug("one column too many", BLOCKS, "int count = min(columns - column, chunk)",
        "int count = min(columns - column + 1, chunk)", check="asan"),
    Bug("x V is no number beyond the rank", BLOCKS, "values[i] = 0.0f", "values[i] = 0.0f / 0.0f"),
    Bug("a tile of ranks is left out", BLOCKS, "padded / Tile::kDepth,",
        "padded / Tile::kDepth - 1,"),
    Bug("a tile of ranks too many", BLOCKS, "padded / Tile::kDepth,",
        "padded / Tile::kDepth + 1,"),
    Bug("no activation", BLOCKS, "activate<T, chunk>(sums, activation);"),
    Bug("no residual", BLOCKS, "if (residual.data)", "if (false)"),
    Bug("columns that blocks share overlap", LINEAR, "begin = share * columns", "begin = 0"),
    Bug("the gate is forgotten", LINEAR, "values[i] *= gate[i]", "values[i] *= 1", op="gated"),
    Bug("the mean of one lane alone", BLOCKS, "mean += apart * part;", op="mlp"),
    Bug("deviations of means are forgotten", BLOCKS, "apart * apart * part * count", "0",
        op="mlp"),
    Bug("rows are not normalised", BLOCKS, "if (!wanted) return;", "return;", op="mlp"),
    Bug("no barrier before parts are added", CHAIN, "  __syncthreads();\n", check="tsan",
        after="void drain_chained("),
    Bug("no barrier among warps that share rows", CHAIN, "    __syncthreads();\n"),
    Bug("a warp's part is left out", CHAIN, "part < Tile::kWarpsAcross",
        "part + 1 < Tile::kWarpsAcross"),
    Bug("registers of the middle exchanged", CHAIN, "from[w % 2 * 2], from[w % 2 * 2 + 1]",
        "from[w % 2 * 2 + 1], from[w % 2 * 2]"),
    Bug("float32's depths in the other order", TILES, "chained ? 2 * (lane % 4)",
        "!chained ? 2 * (lane % 4)", op="mlp"),
    Bug("hidden units that blocks share overlap", MLP, "begin = part * units", "begin = 0"),
    Bug("biases beyond the hidden layer", MLP, "p.b1 && column < p.hidden", "p.b1", check="asan"),
    Bug("the last part is not added", MLP, "part < p.parts; ++part", "part + 1 < p.parts; ++part"),
    Bug("sums are not rescaled", ATTENTION, "+ at % 2] *= shrink", "+ at % 2] *= 1"),
    Bug("the maximum of one lane alone", ATTENTION, "higher = max_lanes<4>(higher);"),
    Bug("the total of one lane alone", ATTENTION, "sum_lanes<4>(total[half])", "total[half]"),
    Bug("keys beyond the last one", ATTENTION, "if (key >= p.tokens) return kNothing;"),
    Bug("a masked row is no number", ATTENTION, "? 0.0f : higher", "? higher : higher"),
    Bug("the mask of the first image", ATTENTION, "image * p.mask_strides[0]", "0"),
    Bug("queries beyond the last one", ATTENTION, "if (query < p.tokens)", "if (true)",
        check="asan"),
    Bug("values' weights from the first tile on", PROJECT, "if (third) tile -=",
        "if (false) tile -="),
    Bug("errors are one rank off", ERRORS, "errors[rank] =", "errors[rank ^ 1] ="),
    Bug("what lies behind is not added", ERRORS, "sum += behind;"),
    Bug("lanes beyond the warp are added", ERRORS, "if (lane + step < kWarp) sum", "sum"),
]


def noticed(bug: Bug, check: str) -> str | None:
    """How `check` notices a bug, in a word or two; None if it does not."""
    runs: Callable[[Host], bool] = RIGHT.get(bug.op) or RIGHT.get(bug.file) or right_linear
    for seed in (1, 2) if check == "plain" else (1,):
        host = Host("quick" if check == "plain" else check, bug.sources(), seed,
                    bug.multiprocessors)
        try:
            if not runs(host):
                return "results"
        except Failed as failure:
            return str(failure).partition(":")[0].rpartition(", ")[2]
    return None


def right_svd(host: Host) -> bool:
    """Whether SVDs are right for zero columns, equal values and NaN, by a warp and by a block.

    The matrices need few sweeps, since sanitizers are slow.
    """
    generator = torch.Generator().manual_seed(5)
    small = torch.randn(3, 7, 9, generator=generator) * 1e20
    small[0, 2] = 0
    small[1] = torch.eye(7, 9)
    small[2, 1, 1] = torch.nan
    large = torch.eye(34) + 1e-4 * torch.randn(1, 34, 34, generator=generator)
    large[0, :, 5:7] = 0
    for a, expected in ((small, [0, 0, 1]), (large[:, :, :33], [0])):
        u, s, v, status = cuda_calls.batched_svd(host, a.contiguous(), min(a.shape[1:]))
        if status.tolist() != expected:
            return False
        try:
            for i in range(len(a) if len(a) == 1 else 2):
                check(a[i], u[i], s[i], v[i])
        except AssertionError:
            return False
    return True


def right_errors(host: Host) -> bool:
    s = torch.rand(3, 2, 40, generator=torch.Generator().manual_seed(5))
    expected = reference.truncation_errors(s)
    return torch.allclose(cuda_calls.truncation_errors(host, s), expected, rtol=1e-5, atol=0)


def apart(t: torch.Tensor, pitch: int) -> torch.Tensor:
    """The rows of a matrix at multiples of `pitch`."""
    if t.dim() == 1:
        return t
    gap = t.new_full((len(t), -t.shape[1] % pitch), torch.nan)
    return torch.cat([t, gap], 1)[:, : t.shape[1]]


def right_linear(host: Host) -> bool:
    """Whether the op is right for several row layouts, with NaN between rows, and a long sum."""
    torch.manual_seed(5)
    for shape, dtype in (((19, 72, 40, 144), "fp16"), ((17, 36, 9, 40), "fp32"),
                         ((2, 1000, 9, 20), "fp32"), ((18, 33, 21, 30), "fp16"),
                         ((17, 24, 12, 20), "bf16")):
        kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
        tensors = draw(shape, kinds[dtype])
        for pitch in (1, 8, 5):
            layout = {name: apart(t, pitch) for name, t in tensors.items()}
            found = cuda_calls.low_rank_linear(
                host, **layout, activation="gelu", keep_intermediates=True)
            if complaints(found, tensors, "gelu", dtype):
                return False
    return True


def right_gated(host: Host) -> bool:
    sizes = {"lead": (18,), "d": 24, "r": 12, "out": 30}
    return not cuda_cases.complaints(host, Case("gated_low_rank_linear", "few", sizes), "fp16")


def right_mlp(host: Host) -> bool:
    """Whether it is right with its layer norm and residual, by one launch and by two."""
    options = {"ACTIVATION": "gelu"}
    for dtype, (m, d, r1, h, r2, n) in (("fp16", (19, 40, 12, 200, 24, 40)),
                                        ("fp32", (17, 33, 9, 70, 7, 29))):
        sizes = dict(lead=(m,), d=d, r1=r1, hidden=h, r2=r2, out=n)
        case = Case("low_rank_mlp", "few", sizes, options, sublayer=True)
        if cuda_cases.complaints(host, case, dtype):
            return False
    return True


def right_attention(host: Host) -> bool:
    """Whether it is right for rows that are masked entirely, and where a mask is added."""
    for dtype, (batch, tokens, d, heads, qk, vo, mask) in (
            ("fp16", (2, 69, 24, 2, 8, 24, "rows")), ("fp32", (1, 40, 16, 2, 8, 7, "additive"))):
        sizes = dict(batch=batch, tokens=tokens, d=d, rank_qk=qk, rank_vo=vo, mask=mask)
        options = {"NUM_HEADS": heads, "SCALE": 0.5}
        case = Case("low_rank_attention", "few", sizes, options, sublayer=True)
        if cuda_cases.complaints(host, case, dtype):
            return False
    return True


RIGHT = {SVD: right_svd, ERRORS: right_errors, CHAIN: right_mlp, MLP: right_mlp,
         ATTENTION: right_attention, PROJECT: right_attention, "mlp": right_mlp,
         "gated": right_gated}


def ptx_tally(op: str, architecture: str, step: int = 1) -> dict[str, Counter]:
    """Mutants of a kernel's PTX and those noticed, by kind; one of each `step` mutants runs."""
    runs = {"batched_svd": emulated_svd, "low_rank_linear": emulated_linear,
            "low_rank_mlp": emulated_mlp, "low_rank_attention": emulated_attention}
    originals: list[Kernel] = []
    emulated = Emulated(architecture, lambda k: originals.append(k) or k)
    right = runs[op](emulated)
    stem = op.removeprefix("low_rank_") if op == "low_rank_attention" else op
    original = next(kernel for kernel in originals if f"{stem}_kernel" in kernel.name)
    found: dict[str, Counter] = {}
    for kind in ("barriers", "waits", "transposes", "operands"):
        found[kind] = Counter()
        # Operands and transposes are all alike.
        alike = 8 if kind in ("transposes", "operands") else 1
        for mutant in islice(KINDS[kind](original), 0, None, step * alike):
            found[kind]["all"] += 1
            try:
                emulated.mutate = lambda k, mutant=mutant: mutant if k.name == mutant.name else k
                result = runs[op](emulated)
                same = all(torch.equal(a, b) for a, b in zip(result, right, strict=True))
            except Fault:
                same = False
            found[kind]["caught"] += not same
    return found


def emulated_svd(emulated: Emulated) -> tuple[torch.Tensor, ...]:
    """A tall and a wide matrix, one block each, with few sweeps and two zero columns to fill."""
    generator = torch.Generator().manual_seed(5)
    a = torch.eye(34, 33) + 1e-4 * torch.randn(1, 34, 33, generator=generator)
    a[0, :, 5:7] = 0
    return *cuda_calls.batched_svd(emulated, a, 33), *cuda_calls.batched_svd(emulated, a.mT, 33)


def emulated_linear(emulated: Emulated) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5)
    emulated.multiprocessors = 1
    tensors = draw((64, 64, 160, 160), torch.float16)
    return cuda_calls.low_rank_linear(emulated, **tensors, keep_intermediates=True)


def emulated_mlp(emulated: Emulated) -> tuple[torch.Tensor, ...]:
    """Two passes of either layer; the hidden one in parts of two steps, then in one piece."""
    torch.manual_seed(5)
    shapes = (35, 24), (24, 200), (400, 200), (400,), (400, 200), (40, 200), (40,)
    x, *others = (torch.randn(s).half() for s in shapes)
    emulated.multiprocessors = 12
    several = cuda_calls.low_rank_mlp(emulated, x, *others, "gelu", keep_intermediates=True)
    emulated.multiprocessors = 5
    return *several, *cuda_calls.low_rank_mlp(emulated, x, *others, "gelu")[:1]


def emulated_attention(emulated: Emulated) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5)
    x, *weights = (torch.randn(s).half() for s in
                   ((1, 129, 16), (48, 16), (48, 16), (136, 16), (16, 136)))
    wq, wk, wv, wo = weights
    return cuda_calls.low_rank_attention(emulated, x, wq, None, wk, wv, wo, None, 1, 0.02)
