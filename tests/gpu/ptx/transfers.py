"""Instructions that move data: loads, stores, matrices, asynchronous copies, shuffles."""

import math
from dataclasses import dataclass

import numpy as np

from ptx.machine import TYPES, WARP, Lanes, Machine, Mask, Step
from ptx.memory import UNSIGNED, Fault, Memory, put, take
from ptx.parser import Instruction, registers_of


def _space(instruction: Instruction) -> str:
    for space in ("shared", "param"):
        if any(part.startswith(space) for part in instruction.parts):
            return space
    return "global"


def load(machine: Machine, instruction: Instruction) -> Step:
    space, targets = _space(instruction), registers_of(instruction.operands[0])
    kind = np.dtype(TYPES[instruction.parts[-1]])
    address = machine.address(instruction.operands[1], space)

    def from_parameters(mask: Mask) -> None:
        offsets = address()
        outside = (offsets < 0) | (offsets + len(targets) * kind.itemsize > machine.parameters.size)
        if (outside if mask is None else outside & mask).any():
            raise Fault("out of bounds: a load of parameters")
        # Threads that do not take part may hold anything as an address.
        offsets = np.where(outside, 0, offsets)
        for i, target in enumerate(targets):
            at = offsets[:, None] + i * kind.itemsize + np.arange(kind.itemsize)
            value = np.ascontiguousarray(machine.parameters[at]).view(kind)[:, 0]
            machine.write(target, value, mask)

    def from_memory(mask: Mask) -> None:
        memory = machine.shared if space == "shared" else machine.memory
        width = kind.itemsize * len(targets)
        threads, offsets = machine.access(memory, address(), width, mask, "load")
        found = take(memory.views[kind.itemsize], offsets // width, len(targets))
        for i, target in enumerate(targets):
            value = np.zeros(machine.lanes, UNSIGNED[kind.itemsize])
            value[threads] = found[:, i]
            machine.write(target, value.view(kind), mask)

    return from_parameters if space == "param" else from_memory


def store(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.parts[-1]
    size = np.dtype(TYPES[kind]).itemsize
    values = [machine.source(name, kind) for name in registers_of(instruction.operands[1])]
    space = _space(instruction)
    address = machine.address(instruction.operands[0], space)

    def step(mask: Mask) -> None:
        memory = machine.shared if space == "shared" else machine.memory
        threads, offsets = machine.access(memory, address(), size * len(values), mask, "store")
        lanes = [machine.on_all_lanes(value()).view(UNSIGNED[size])[threads]
                 for value in values]
        _put(memory, size, offsets // (size * len(values)), np.stack(lanes, 1))

    return step


def _put(memory: Memory, width: int, runs: Lanes, values: Lanes) -> None:
    """Write rows of numbers; several threads may write one place, but only if they agree."""
    count = values.shape[1]
    put(memory.views[width], runs, count, values)
    if (take(memory.views[width], runs, count) != values).any():
        raise Fault(f"race: threads store different values to one {memory.name} address")


def _matrix_rows(machine: Machine, offsets: Lanes, count: int, mask: Mask, kind: str):
    """The warps that run, and which 16 bytes the 8 rows are of each of their `count` matrices."""
    warps = machine.whole_warps(mask, kind)
    threads, rows = (lanes.reshape(-1, WARP)[warps][:, : 8 * count].reshape(-1)
                     for lanes in (machine.thread, offsets))
    machine.check(machine.shared, threads, rows, 16, kind)
    return warps, rows // 16


def load_matrix(machine: Machine, instruction: Instruction) -> Step:
    """8 x 8 matrices of 16-bit elements: thread 4 g + t gets elements 2 t, 2 t + 1 of row g."""
    targets, transposed = registers_of(instruction.operands[0]), "trans" in instruction.parts
    address = machine.address(instruction.operands[1], "shared")
    count = len(targets)

    def step(mask: Mask) -> None:
        warps, rows = _matrix_rows(machine, address(), count, mask, "load")
        matrices = take(machine.shared.views[2], rows, 8).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, WARP)
        for i, target in enumerate(targets):
            value = machine.registers[target].copy()
            value.reshape(-1, WARP)[warps] = words[:, i]
            machine.registers[target] = value

    return step


def store_matrix(machine: Machine, instruction: Instruction) -> Step:
    sources, transposed = registers_of(instruction.operands[1]), "trans" in instruction.parts
    address = machine.address(instruction.operands[0], "shared")
    count = len(sources)

    def step(mask: Mask) -> None:
        warps, rows = _matrix_rows(machine, address(), count, mask, "store")
        lanes = [machine.registers[name].reshape(-1, WARP)[warps] for name in sources]
        matrices = np.stack(lanes, 1).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        _put(machine.shared, 2, rows, matrices.reshape(-1, 8))

    return step


@dataclass
class Copy:
    """One cp.async in flight: where to, where from, how much, its group, and who still waits."""

    to: Lanes
    source: Lanes
    width: int
    size: Lanes
    group: Lanes
    waiting: Lanes


def copy_async(machine: Machine, instruction: Instruction) -> Step:
    """Data arrives at the wait: what reads it earlier, or refills it too early, is caught."""
    parts, operands = instruction.parts, instruction.operands
    if "commit_group" in parts:

        def commit(mask: Mask) -> None:
            machine.copy_groups += 1 if mask is None else mask

        return commit
    if "wait_group" in parts or "wait_all" in parts:
        in_flight = int(operands[0], 0) if operands else None
        return lambda mask: _wait(machine, in_flight, mask)
    if "bulk" in parts:
        raise NotImplementedError("copies by the tensor memory accelerator")
    to, source = machine.address(operands[0], "shared"), machine.address(operands[1], "global")
    width = int(operands[2], 0)
    has_size = len(operands) > 3
    size = machine.source(operands[3] if has_size else operands[2], "u32")

    def step(mask: Mask) -> None:
        active = np.ones(machine.lanes, bool) if mask is None else mask
        sizes = machine.on_all_lanes(size()).astype(np.int64)
        destinations, sources = to(), source()
        reads = active & (sizes > 0)
        if (sizes[active] < width).any():
            machine.shortened.add(machine.at)
        if reads.any():
            machine.access(machine.memory, sources, width, reads, "load")
        machine.access(machine.shared, destinations, width, active, "copy")
        group = machine.copy_groups.copy()
        machine.copies.append(Copy(destinations, sources, width, sizes, group, active.copy()))
        if machine.trace and active.any():
            machine.trace.issue(True, group, frozenset())

    return step


def _wait(machine: Machine, in_flight: int | None, mask: Mask) -> None:
    """Let the copies arrive of all groups but the last `in_flight`; None: of all, committed or not.

    Arrival is no access of its own: the copy was recorded as a store when it was issued.
    """
    if machine.trace:
        active = np.ones(machine.lanes, bool) if mask is None else mask.copy()
        left = -math.inf if in_flight is None else in_flight
        machine.trace.wait(True, machine.at, left, active, machine.copy_groups.copy())
    for copy in machine.copies:
        arriving = copy.waiting.copy()
        if in_flight is not None:
            arriving &= copy.group < machine.copy_groups - in_flight
        if mask is not None:
            arriving &= mask
        if not arriving.any():
            continue
        threads, width = np.flatnonzero(arriving), copy.width
        offsets, sources, size = (lanes[threads] for lanes in (copy.to, copy.source, copy.size))
        # What was issued is not initialised until it arrives, or until somebody else stores.
        if take(machine.shared.initialised, offsets // width, width).any():
            raise Fault("race: cp.async arrives over what was stored since it was issued")
        data = take(machine.memory.bytes, np.where(size > 0, sources, 0) // width, width)
        if (size < width).any():
            data[np.arange(width) >= size[:, None]] = 0
        put(machine.shared.bytes, offsets // width, width, data)
        put(machine.shared.initialised, offsets // width, width, True)
        # Other threads see the data after the next barrier, so it counts as stored now.
        machine.order(machine.shared, threads, offsets, width, "store")
        copy.waiting &= ~arriving
    machine.copies = [copy for copy in machine.copies if copy.waiting.any()]


def shuffle(machine: Machine, instruction: Instruction) -> Step:
    """shfl.sync: the value of another lane of the warp."""
    operands, mode = instruction.operands, instruction.parts[2]
    target, *succeeded = operands[0].split("|")
    value, lane = machine.source(operands[1], "b32"), machine.source(operands[2], "u32")
    clamp, members = machine.source(operands[3], "u32"), machine.source(operands[4], "u32")

    def step(mask: Mask) -> None:
        own = np.arange(machine.lanes) % WARP
        offset, limits = lane().astype(np.int64) & 31, clamp().astype(np.int64)
        last, segment = limits & 31, (limits >> 8) & 31
        highest, lowest = (own & segment) | (last & ~segment), own & segment
        other = {
            "bfly": own ^ offset,
            "down": own + offset,
            "up": own - offset,
            "idx": lowest | (offset & ~segment),
        }[mode]
        valid = other >= highest if mode == "up" else other <= highest
        needed = (members().astype(np.int64) >> own & 1).astype(bool)
        if mask is not None:
            runs = np.repeat(mask.reshape(-1, WARP).any(1), WARP)
            if (needed & runs & ~mask).any():
                raise Fault("shfl.sync names a lane that is not there")
        where = np.arange(machine.lanes) - own + np.where(valid, other, own)
        machine.write(target, machine.on_all_lanes(value())[where], mask)
        if succeeded:
            machine.write(succeeded[0], valid, mask)

    return step
