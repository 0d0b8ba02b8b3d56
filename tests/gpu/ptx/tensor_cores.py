"""mma.sync (m16n8k*) and wgmma (m64n*k*): 16-bit and tf32 operands, float32 sums.

The model adds an instruction's products and its addend exactly and truncates the sum to float32,
as the hardware does (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores,
2021). Errors therefore grow with the number of instructions. The hardware also drops low bits of
single products and adds a few products at a time, depending on the generation; the model does not.
"""

from collections.abc import Callable

import numpy as np

from ptx.machine import WARP, Lanes, Machine, Mask, Step
from ptx.memory import Fault, take
from ptx.number_formats import bf16_to_f32, truncate_to_tf32
from ptx.parser import Instruction, registers_of, search

GROUP = 128  # threads of a warpgroup
DECODE: dict[str, Callable[[Lanes], Lanes]] = {
    "f16": lambda bits: bits.view(np.float16).astype(np.float32),
    "bf16": bf16_to_f32,
    "tf32": lambda bits: truncate_to_tf32(bits.view(np.float32)),
}
# Width in bytes of the rows that a wgmma descriptor's layout swizzles, by its two highest bits.
SWIZZLE = {1: 128, 2: 64, 3: 32}


def _kinds(instruction: Instruction) -> tuple[str, int, np.dtype]:
    """The operands' type, elements in a 32-bit register, and the type of their bits."""
    kinds = [part for part in instruction.parts if part in (*DECODE, "f32")]
    if kinds[0] != "f32" or kinds[1] not in DECODE:
        raise NotImplementedError(str(instruction))
    per_register = 1 if kinds[1] == "tf32" else 2
    return kinds[1], per_register, np.dtype(np.uint32 if per_register == 1 else np.uint16)


def _sizes(instruction: Instruction) -> tuple[int, int, int]:
    m, n, k = search(r"m(\d+)n(\d+)k(\d+)", instruction.opcode).groups()
    return int(m), int(n), int(k)


def _products(a: Lanes, b: Lanes) -> Lanes:
    """a bᵀ in float64, where a product of two elements is exact."""
    return np.matmul(a, b.swapaxes(-2, -1), dtype=np.float64)


def _truncated(sums: Lanes) -> Lanes:
    """Cut towards zero to the 24 bits of float32; below its normal numbers, rounded."""
    bits = sums.view(np.uint64) & np.uint64(0xFFFFFFFFE0000000)
    return bits.view(np.float64).astype(np.float32)


def mma(machine: Machine, instruction: Instruction) -> Step:
    """d = a b + c for each warp; lane 4 g + t holds elements of rows g, g + 8 and columns by t."""
    rows, columns, depth = _sizes(instruction)
    if (rows, columns) != (16, 8):
        raise NotImplementedError(str(instruction))
    kind, per, bits = _kinds(instruction)
    half = 4 * per
    result, a_names, b_names, c_names = (registers_of(o) for o in instruction.operands)
    addends = [machine.source(name, "f32") for name in c_names]

    def half_of(register: int) -> slice:
        """The rows of a sum that a register belongs to."""
        return slice(8, 16) if register >> 1 else slice(0, 8)

    def step(mask: Mask) -> None:
        warps = machine.whole_warps(mask, "mma")
        count = machine.lanes // WARP if mask is None else len(warps)

        def fragment(name: str) -> Lanes:
            """The register as 8 rows a warp, each row held by four lanes."""
            lanes = np.ascontiguousarray(machine.registers[name]).view(bits)
            return DECODE[kind](lanes).reshape(-1, 8, half)[warps]

        a = np.empty((count, 16, depth), np.float32)
        b = np.empty((count, 8, depth), np.float32)  # transposed
        c = np.empty((count, 16, 8), np.float32)
        for i, name in enumerate(a_names):
            row, column = 8 * (i & 1), half * (i >> 1)
            a[:, row : row + 8, column : column + half] = fragment(name)
        for i, name in enumerate(b_names):
            b[:, :, half * i : half * (i + 1)] = fragment(name)
        for i, addend in enumerate(addends):
            lanes = machine.on_all_lanes(addend()).reshape(-1, 8, 4)[warps]
            c[:, half_of(i), i & 1 :: 2] = lanes
        d = _truncated(_products(a, b) + c)
        for i, name in enumerate(result):
            value = machine.registers[name].copy().view(np.float32)
            value.reshape(-1, 8, 4)[warps] = d[:, half_of(i), i & 1 :: 2]
            machine.registers[name] = value.view(np.uint32)

    return step


def wgmma(machine: Machine, instruction: Instruction) -> Step:
    """wgmma is asynchronous: it is computed at its wait, from shared memory as it is then.

    An instruction that reads the result earlier sees old registers. A store to the operands before
    the wait is a race.
    """
    if "fence" in instruction.parts:
        return lambda mask: None
    if "commit_group" in instruction.parts:

        def commit(mask: Mask) -> None:
            machine.product_groups += 1

        return commit
    if "wait_group" in instruction.parts:
        in_flight = int(instruction.operands[0], 0)

        def wait(mask: Mask) -> None:
            if machine.trace:
                groups = np.full(machine.lanes, machine.product_groups)
                everyone = np.ones(machine.lanes, bool)
                machine.trace.wait(False, machine.at, in_flight, everyone, groups)
            while machine.products and machine.products[0][0] < machine.product_groups - in_flight:
                machine.products.pop(0)[1]()

        return wait
    product = Product(machine, instruction)

    def issue(mask: Mask) -> None:
        if mask is not None:
            raise Fault("wgmma by part of the grid")
        machine.products.append((machine.product_groups, product.issue()))
        if machine.trace:
            groups = np.full(machine.lanes, machine.product_groups)
            machine.trace.issue(False, groups, product.registers)

    return issue


class Product:
    """One wgmma.mma_async: 64 rows of a, from registers or shared memory, times b."""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        self.machine = machine
        _, self.columns, self.depth = _sizes(instruction)
        self.kind, self.per, self.bits = _kinds(instruction)
        target, a, b, scale, *flags = instruction.operands
        flags = [int(flag, 0) for flag in flags]
        if flags[:2] != [1, 1]:
            raise NotImplementedError("wgmma with negated operands")
        self.result = registers_of(target)
        self.a_names = registers_of(a) if a.startswith("{") else None
        self.registers = frozenset(self.result + (self.a_names or []))
        self.a_descriptor = None if self.a_names else machine.source(a, "u64")
        self.b_descriptor = machine.source(b, "u64")
        # Transposition flags: both operands', or only b's where a is in registers.
        transposed = [False] * (2 - len(flags[2:])) + [flag == 1 for flag in flags[2:]]
        self.a_transposed, self.b_transposed = transposed
        self.keep = machine.source(scale, "pred")

    def issue(self) -> Callable[[], None]:
        """Read descriptors now; the returned function reads registers, and computes."""
        machine = self.machine
        keep = machine.on_all_lanes(self.keep()).copy()
        b = self.chunks(self.b_descriptor(), self.columns, self.b_transposed)
        if self.a_names:
            return lambda: self.compute(self._from_registers(), b, keep)
        a = self.chunks(self.a_descriptor(), 64, self.a_transposed)
        return lambda: self.compute(self.tile(a, self.a_transposed), b, keep)

    def compute(self, a: Lanes, b_chunks: Lanes, keep: Lanes) -> None:
        """Lane 4 g + t of a warp has elements 2 t, 2 t + 1 of every 8 columns of rows g, g + 8."""
        b = self.tile(b_chunks, self.b_transposed)
        d = _products(a, b)
        parts = d.reshape(-1, 4, 2, 8, self.columns // 8, 4, 2)
        lanes = parts.transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(self.result), -1)
        registers, kept = self.machine.registers, keep.all()
        for name, sums in zip(self.result, lanes, strict=True):
            before = registers[name].view(np.float32)
            before = before if kept else np.where(keep, before, np.float32(0))
            registers[name] = _truncated(before + sums).view(np.uint32)

    def _from_registers(self) -> Lanes:
        half = 4 * self.per
        a = np.empty((self.machine.lanes // GROUP, 4, 16, self.depth), np.float32)
        for i, name in enumerate(self.a_names):
            values = DECODE[self.kind](self.machine.registers[name].view(self.bits))
            row, column = 8 * (i & 1), half * (i >> 1)
            a[:, :, row : row + 8, column : column + half] = values.reshape(-1, 4, 8, half)
        return a.reshape(-1, 64, self.depth)

    def chunks(self, descriptor: Lanes, rows: int, transposed: bool) -> Lanes:
        """Where the 16-byte chunks are of the operand that a descriptor points to, checked."""
        machine = self.machine
        groups = machine.on_all_lanes(descriptor).reshape(-1, GROUP)
        if (groups != groups[:, :1]).any():
            raise Fault("a wgmma descriptor differs inside a warpgroup")
        chunks = self._chunks(groups[:, 0], rows, transposed)
        chunks += machine.shared_base[::GROUP, None, None]
        self._check(chunks)
        return chunks

    def _check(self, chunks: Lanes) -> None:
        """All warps of the group read it, so only barriers of the block come before and after."""
        machine = self.machine
        threads = np.repeat(machine.thread[::GROUP], chunks[0].size)
        machine.check(machine.shared, threads, chunks.reshape(-1), 16, "load", collective=True)

    def tile(self, chunks: Lanes, transposed: bool) -> Lanes:
        """The operand (groups, rows, depth); its reads are checked once more."""
        self._check(chunks)
        size = self.bits.itemsize
        values = take(self.machine.shared.views[size], chunks.reshape(-1) // 16, 16 // size)
        values = DECODE[self.kind](values).reshape(*chunks.shape[:2], -1)
        return values.swapaxes(1, 2) if transposed else values

    def _chunks(self, descriptor: Lanes, rows: int, transposed: bool) -> Lanes:
        """Byte offsets of the operand's 16-byte chunks, swizzled: (groups, rows or depth, ...)."""
        layout = int(descriptor[0] >> np.uint64(62))
        if layout not in SWIZZLE:
            raise NotImplementedError("wgmma operands without a swizzle")
        width, size = SWIZZLE[layout], self.bits.itemsize
        start, leading, stride = (
            ((descriptor >> np.uint64(shift)) & np.uint64(0x3FFF)).astype(np.int64)[:, None, None]
            * 16
            for shift in (0, 16, 32)
        )
        lines = np.arange(self.depth if transposed else rows)[:, None]
        across = np.arange((rows if transposed else self.depth) * size // 16)[None] * 16
        at = start + lines // 8 * stride + lines % 8 * width
        if transposed:
            at = at + across // width * leading + across % width
        else:
            at = at + across
        return at ^ ((at >> 7 & (width // 16 - 1)) << 4)
