"""Small damage to compiled kernels, to see whether the emulator's checks notice."""

import os
from collections.abc import Iterator
from dataclasses import replace

from ptx.parser import Instruction, Kernel

# Whether tests of tests run whole; they change only with kernels and checks.
ALL_MUTANTS = os.environ.get("MUTANTS") == "all"
NOTHING = Instruction("membar.cta", ())


def _changed(kernel: Kernel, place: int, instruction: Instruction) -> Kernel:
    code = list(kernel.code)
    code[place] = instruction
    return kernel.with_code(code)


def dropped_barriers(kernel: Kernel) -> Iterator[Kernel]:
    for place, instruction in enumerate(kernel.code):
        if instruction.opcode.startswith(("bar.sync", "barrier.sync")):
            yield _changed(kernel, place, NOTHING)


def dropped_waits(kernel: Kernel) -> Iterator[Kernel]:
    """Waits for copies and products: each left out."""
    for place, instruction in enumerate(kernel.code):
        if "wait_group" in instruction.opcode:
            yield _changed(kernel, place, NOTHING)


def weakened_waits(kernel: Kernel) -> Iterator[Kernel]:
    """Waits that leave one more group in flight."""
    for place, instruction in enumerate(kernel.code):
        if "wait_group" in instruction.opcode:
            groups = str(int(instruction.operands[0], 0) + 1)
            yield _changed(kernel, place, replace(instruction, operands=(groups,)))


def dropped_fences(kernel: Kernel) -> Iterator[Kernel]:
    """Between stores to shared memory and the wgmma that read them."""
    for place, instruction in enumerate(kernel.code):
        if instruction.opcode.startswith("fence.proxy.async"):
            yield _changed(kernel, place, NOTHING)


def flipped_transposes(kernel: Kernel) -> Iterator[Kernel]:
    for place, instruction in enumerate(kernel.code):
        if instruction.parts[0] != "ldmatrix":
            continue
        opcode = instruction.opcode
        other = opcode.replace(".trans", "") if ".trans" in opcode else opcode.replace(
            ".shared", ".trans.shared")  # fmt: skip
        yield _changed(kernel, place, replace(instruction, opcode=other))


def swapped_operands(kernel: Kernel) -> Iterator[Kernel]:
    """The first two registers of an mma's left operand, or wgmma's descriptors."""
    for place, instruction in enumerate(kernel.code):
        operands = list(instruction.operands)
        if instruction.parts[0] == "mma":
            first, second, *rest = operands[1].strip("{} ").split(",")
            operands[1] = "{" + ",".join([second, first, *rest]) + "}"
        elif instruction.parts[0] == "wgmma" and len(operands) > 3:
            if operands[1].startswith("{"):
                first, second, *rest = operands[1].strip("{} ").split(",")
                operands[1] = "{" + ",".join([second, first, *rest]) + "}"
            else:
                operands[1], operands[2] = operands[2], operands[1]
        else:
            continue
        yield _changed(kernel, place, replace(instruction, operands=tuple(operands)))


def dropped_guards(kernel: Kernel) -> Iterator[Kernel]:
    """What keeps threads from loading and storing: predicates, and the sizes of copies."""
    for place, instruction in enumerate(kernel.code):
        name, operands = instruction.parts[0], instruction.operands
        if instruction.guard and name in ("ld", "st"):
            yield _changed(kernel, place, replace(instruction, guard=None))
        elif name == "cp" and len(operands) > 3:  # the fourth is how much is read of the third
            yield _changed(kernel, place, replace(instruction, operands=operands[:3]))


def place_of(mutant: Kernel, original: Kernel) -> int:
    """Where the one instruction is that differs."""
    pairs = zip(mutant.code, original.code, strict=True)
    return next(place for place, (now, before) in enumerate(pairs) if now is not before)


KINDS = {
    "barriers": dropped_barriers,
    "fences": dropped_fences,
    "waits": dropped_waits,
    "weak waits": weakened_waits,
    "transposes": flipped_transposes,
    "operands": swapped_operands,
    "guards": dropped_guards,
}
