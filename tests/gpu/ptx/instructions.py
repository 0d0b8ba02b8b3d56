"""One instruction → what the machine does: control flow, arithmetic, or a more special module."""

from collections.abc import Callable

import numpy as np

from ptx import tensor_cores, transfers
from ptx.arithmetic import arithmetic
from ptx.machine import Machine, Mask, Step
from ptx.parser import Instruction

# Ordering of memory that a machine without caches has anyway; not checked (see README of tests).
NO_EFFECT = ("membar", "fence", "griddepcontrol", "prefetch", "createpolicy", "discard")
BARRIERS = ("bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.sync.aligned")
SPECIAL: dict[str, Callable[[Machine, Instruction], Step]] = {
    "ld": transfers.load,
    "st": transfers.store,
    "ldmatrix": transfers.load_matrix,
    "stmatrix": transfers.store_matrix,
    "cp": transfers.copy_async,
    "shfl": transfers.shuffle,
    "mma": tensor_cores.mma,
    "wgmma": tensor_cores.wgmma,
}


def compile_instruction(
    machine: Machine, instruction: Instruction
) -> tuple[str, Step | Callable[[], np.ndarray] | None, int]:
    """("compute", step), ("branch", condition, target), ("barrier",) or ("end", condition)."""
    name = instruction.parts[0]
    condition = (
        machine.source(instruction.guard, "pred") if instruction.guard is not None else None
    )
    if name == "bra":
        return "branch", condition, machine.kernel.labels[instruction.operands[0]]
    if name in ("ret", "exit"):
        return "end", condition, 0
    if instruction.opcode in BARRIERS:
        if condition is not None:
            raise NotImplementedError("a guarded barrier")
        return "barrier", None, 0
    return "compute", _guarded(machine, instruction, _step(machine, instruction)), 0


def _guarded(machine: Machine, instruction: Instruction, step: Step) -> Step:
    """The step, for the threads whose guard holds."""
    if instruction.guard is None:
        return step
    guard = machine.source(instruction.guard, "pred")

    def when_true(mask: Mask) -> None:
        active = guard() if mask is None else guard() & mask
        if active.all():
            step(None)
            return
        if mask is None or (active != mask).any():
            machine.held_back.add(machine.at)
        if active.any():
            step(active)

    return when_true


def _step(machine: Machine, instruction: Instruction) -> Step:
    name = instruction.parts[0]
    if instruction.opcode.startswith("bar.warp.sync"):
        return lambda mask: _pass_warp_barrier(machine, mask)
    if instruction.opcode.startswith("fence.proxy.async"):
        return machine.fence
    if name in NO_EFFECT:
        return lambda mask: None
    return SPECIAL.get(name, arithmetic)(machine, instruction)


def _pass_warp_barrier(machine: Machine, mask: Mask) -> None:
    machine.warp_barriers[machine.whole_warps(mask, "bar.warp.sync")] += 1
