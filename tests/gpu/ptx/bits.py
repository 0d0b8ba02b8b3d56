"""Instructions on the bits of registers: shifts, fields, bytes, tables."""

import numpy as np

from ptx.machine import TYPES, Machine, Mask, Step
from ptx.parser import Instruction


def shift(machine: Machine, instruction: Instruction) -> Step:
    kind, (target, a, b) = instruction.parts[-1], instruction.operands
    value, amount = machine.source(a, kind), machine.source(b, "u32")
    bits = 8 * np.dtype(TYPES[kind]).itemsize
    left = instruction.parts[0] == "shl"

    def step(mask: Mask) -> None:
        x, count = value(), amount()
        within = np.minimum(count, bits - 1).astype(x.dtype)
        shifted = x << within if left else x >> within
        beyond = x >> (bits - 1) if not left and kind[0] == "s" else np.zeros_like(x)
        machine.write(target, np.where(count < bits, shifted, beyond), mask)

    return step


def funnel_shift(machine: Machine, instruction: Instruction) -> Step:
    """shf: 64 bits made of two registers, shifted; the upper or lower half of it."""
    _, direction, mode, _ = instruction.parts
    target, *names = instruction.operands
    low, high, amount = (machine.source(name, "b32") for name in names)

    def step(mask: Mask) -> None:
        both = high().astype(np.uint64) << np.uint64(32) | low().astype(np.uint64)
        count = amount().astype(np.uint64)
        count = count & np.uint64(31) if mode == "wrap" else np.minimum(count, np.uint64(32))
        result = both << count >> np.uint64(32) if direction == "l" else both >> count
        machine.write(target, result.astype(np.uint32), mask)

    return step


def extract_bits(machine: Machine, instruction: Instruction) -> Step:
    """bfe: `count` bits from `start` on, with the sign of the highest of them for s32."""
    target, *names = instruction.operands
    value, start, count = (machine.source(name, "u32") for name in names)
    signed = instruction.parts[-1] == "s32"

    def step(mask: Mask) -> None:
        length = np.minimum(count(), 32).astype(np.uint64)
        result = value().astype(np.uint64) >> np.minimum(start(), 63).astype(np.uint64)
        result = result & ((np.uint64(1) << length) - np.uint64(1))
        if signed:
            sign = np.uint64(1) << np.maximum(length, np.uint64(1)) - np.uint64(1)
            result = (result ^ sign) - sign
        machine.write(target, result.astype(np.uint32), mask)

    return step


def insert_bits(machine: Machine, instruction: Instruction) -> Step:
    """bfi: the low `count` bits of the first operand replace bits from `start` on of the second."""
    kind, (target, *names) = instruction.parts[-1], instruction.operands
    inserted, into = (machine.source(name, kind) for name in names[:2])
    start, count = (machine.source(name, "u32") for name in names[2:])
    width, unsigned = 8 * np.dtype(TYPES[kind]).itemsize, TYPES[kind]

    def step(mask: Mask) -> None:
        first = np.minimum(start(), 255).astype(np.uint64)
        length = np.minimum(count(), 63).astype(np.uint64)  # 64 bits are never replaced
        field = ((np.uint64(1) << length) - np.uint64(1)) << np.minimum(first, np.uint64(63))
        field = np.where(first < width, field, np.uint64(0))
        value = inserted().astype(np.uint64) << np.minimum(first, np.uint64(63))
        result = into().astype(np.uint64) & ~field | value & field
        machine.write(target, result.astype(unsigned), mask)

    return step


def leading_zeros(machine: Machine, instruction: Instruction) -> Step:
    """clz: the zero bits above the highest one."""
    kind, (target, name) = instruction.parts[-1], instruction.operands
    value, bits = machine.source(name, kind), 8 * np.dtype(TYPES[kind]).itemsize

    def step(mask: Mask) -> None:
        x = value()
        zeros = sum(((x >> x.dtype.type(bit)) == 0).astype(np.uint32) for bit in range(bits))
        machine.write(target, zeros, mask)

    return step


def permute_bytes(machine: Machine, instruction: Instruction) -> Step:
    """prmt: each byte of the result is one of eight, or its sign."""
    target, *names = instruction.operands
    low, high, selector = (machine.source(name, "b32") for name in names)

    def step(mask: Mask) -> None:
        both = low().astype(np.uint64) | high().astype(np.uint64) << np.uint64(32)
        chosen, result = selector().astype(np.uint64), np.uint64(0)
        for i in range(4):
            nibble = chosen >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(nibble & np.uint64(8), sign, byte)
            result = result | byte << np.uint64(8 * i)
        machine.write(target, result.astype(np.uint32), mask)

    return step


def three_input_logic(machine: Machine, instruction: Instruction) -> Step:
    """lop3: any function of three bits, given as a table."""
    target, *names, table = instruction.operands
    sources = [machine.source(name, "b32") for name in names]

    def step(mask: Mask) -> None:
        a, b, c = (source() for source in sources)
        result = np.uint32(0)
        for row in range(8):
            if int(table, 0) >> row & 1:
                term = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                result = result | term
        machine.write(target, result, mask)

    return step
