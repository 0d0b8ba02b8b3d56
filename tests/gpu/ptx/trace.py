"""A full record of shared-memory accesses, which tells the barriers, waits and fences to be spare.

Spare means that a launch is as well ordered without it. This is a second opinion beside
`SharedUse`, which remembers only the last writer and readers. Two accesses of one granule, one of
them a store, must be ordered by one thread's program or by a barrier of the block. Barriers of
warps are ignored, so an instruction is rather called needed than spare.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ptx.parser import Instruction, Kernel, registers_of

SEVERAL = -2  # in place of a thread, for reads by a whole warpgroup
NEVER = np.iinfo(np.int64).max


@dataclass
class Flight:
    """A copy or a product between its issue and its wait, granule by granule.

    `threads` are ordered with it by their program; `lanes` wait for it.
    """

    time: int
    epoch: int
    stores: bool
    granules: np.ndarray
    threads: np.ndarray
    lanes: np.ndarray
    groups: np.ndarray
    registers: frozenset[str]


@dataclass
class Wait:
    """A wait, at which all but the last `left` groups of each lane land."""

    time: int
    epoch: int
    place: int
    left: float
    active: np.ndarray
    groups: np.ndarray


class Trace:
    """Who touched which granules when, and between which barriers."""

    def __init__(self) -> None:
        self.time = 0  # instructions executed
        self.landing = False  # whether this one is a wait
        self.block_size = 0
        self.results: frozenset[str] = frozenset()  # registers that wgmma write, and that they read
        self.sources: frozenset[str] = frozenset()
        self.accesses: list[tuple[np.ndarray, ...]] = []
        self.passed: list[np.ndarray] = []
        self.flights: list[Flight] = []
        self.fences: list[tuple[int, int]] = []  # time and place
        self.waits: dict[bool, list[Wait]] = {True: [], False: []}  # for copies, for products
        self.uses: list[tuple[int, frozenset[str]]] = []  # of these registers by other instructions

    def begin(self, kernel: Kernel, block_size: int) -> None:
        self.block_size = block_size
        products = [ins.operands for ins in kernel.code if "mma_async" in ins.parts]
        self.results = frozenset(name for o in products for name in registers_of(o[0]))
        self.sources = frozenset(name for o in products for name in registers_of(o[1]))

    def recorded(self, instruction: Instruction, step: Callable) -> Callable:
        """`step`, which also advances the time and records the registers used."""
        waits = "wait_group" in instruction.opcode or "wait_all" in instruction.opcode
        used = self._used_registers(instruction)

        def and_recorded(mask: np.ndarray | None) -> None:
            self.time += 1
            self.landing = waits
            step(mask)
            if used:
                self.uses.append((self.time, used))

        return and_recorded

    def _used_registers(self, instruction: Instruction) -> frozenset[str]:
        """The registers used here that a product in flight forbids to use.

        These are its result, and for writing also its operand. Later products may add to the same
        result, so wgmma itself uses none.
        """
        if instruction.parts[0] == "wgmma" or not instruction.operands:
            return frozenset()
        first, *others = (frozenset(registers_of(operand)) for operand in instruction.operands)
        written = frozenset() if instruction.parts[0] == "st" else first & self.sources
        return written | self.results & first.union(*others)

    def touch(
        self, store: bool, granules: np.ndarray, threads: np.ndarray, blocks: np.ndarray
    ) -> None:
        flat = [np.broadcast_to(a, granules.shape).reshape(-1) for a in (granules, threads, blocks)]
        same = (len(self.passed), store, self.time, self.landing)
        self.accesses.append((*flat, *(np.full(granules.size, value) for value in same)))

    def barrier(self, places: np.ndarray) -> None:
        """Each block passes the barrier at a place of its own."""
        self.passed.append(places)

    def fence(self, place: int) -> None:
        self.fences.append((self.time, place))

    def issue(self, stores: bool, groups: np.ndarray, registers: frozenset[str]) -> None:
        """A copy or a product that begins with what this instruction has touched."""
        touched = [access for access in self.accesses if access[5][0] == self.time]
        columns = zip(*(access[:3] for access in touched), strict=True)
        granules, threads, blocks = map(np.concatenate, columns)
        lanes = np.where(threads == SEVERAL, blocks * self.block_size, threads)
        self.flights.append(Flight(self.time, len(self.passed), stores, granules, threads, lanes,
                                   groups[lanes], registers))

    def wait(
        self, copies: bool, place: int, left: float, active: np.ndarray, groups: np.ndarray
    ) -> None:
        self.waits[copies].append(Wait(self.time, len(self.passed), place, left, active, groups))

    @cached_property
    def table(self) -> tuple[np.ndarray, ...]:
        """All accesses: granule, thread, block, epoch, whether a store, time, whether at a wait."""
        return tuple(np.concatenate(column) for column in zip(*self.accesses, strict=True))

    def spare_barrier(self, place: int) -> bool:
        """Whether without the barrier at `place` all accesses are as ordered as before.

        Pairs are counted that only that barrier separates, of different threads, one of which
        stores. Copies and products in flight count where they are issued and where they land.
        """
        others = np.array(self.passed) != place
        # Only what lies right before or after that barrier can be in such a pair.
        near = np.zeros((len(others) + 1, others.shape[1]), bool)
        near[:-1] |= ~others
        near[1:] |= ~others
        near = near[self.table[3], self.table[2]]
        granules, threads, blocks, epochs, stores = (column[near] for column in self.table[:5])
        merged = np.concatenate([np.zeros((1, others.shape[1]), int), np.cumsum(others, 0)])
        together = _numbered(granules, merged[epochs, blocks])
        by_epoch, by_thread = _numbered(together, epochs), _numbered(together, threads)
        return (_pairs(together, stores) - _pairs(by_epoch, stores) - _pairs(by_thread, stores)
                + _pairs(_numbered(by_epoch, threads), stores)) == 0  # fmt: skip

    def spare_wait(self, place: int, left: float) -> bool:
        """Whether all copies or products land in time if the wait at `place` leaves `left` groups.

        In time means before the launch ends; every conflicting access of the same granules comes
        before the issue or after the landing; nothing else uses a product's registers meanwhile.
        """
        copies = any(wait.place == place for wait in self.waits[True])
        waits = self.waits[copies]
        changed = [replace(w, left=left) if w.place == place else w for w in waits]
        for flight in self.flights:
            if flight.stores != copies:
                continue
            before, after = (self._landing(flight, w) for w in (waits, changed))
            late = before[0] != after[0]
            if late.any() and not self._in_time(flight, late, *after):
                return False
        return True

    def spare_fence(self, place: int) -> bool:
        """Whether another fence than that at `place` lies between all stores and their wgmma."""
        granules, *_, stores, times, _ = self.table
        others = [time for time, at in self.fences if at != place]
        for product in self.flights:
            if not product.stores:
                last = max((time for time in others if time < product.time), default=0)
                between = stores & (times > last) & (times < product.time)
                if np.isin(granules[between], product.granules).any():
                    return False
        return True

    def _landing(self, flight: Flight, waits: list[Wait]) -> tuple[np.ndarray, np.ndarray]:
        """The time and the barriers passed at the first wait that is for each of the granules."""
        times, epochs = (np.full(flight.granules.size, NEVER) for _ in range(2))
        for wait in waits:
            if wait.time > flight.time:
                lands = wait.active[flight.lanes] & (times == NEVER)
                lands &= flight.groups < wait.groups[flight.lanes] - wait.left
                times[lands], epochs[lands] = wait.time, wait.epoch
        return times, epochs

    def _in_time(
        self, flight: Flight, late: np.ndarray, times: np.ndarray, epochs: np.ndarray
    ) -> bool:
        if (times == NEVER).any():
            return False
        if any(flight.time < time < times.max() and used & flight.registers
               for time, used in self.uses):
            return False
        granules, threads, _, access_epochs, stores, access_times, landing = self.table
        at = np.full(granules.max() + 1, -1)
        at[flight.granules[late]] = np.flatnonzero(late)
        of = at[granules]
        # Landings follow their issues, which count; reads do not meet.
        meets = (of >= 0) & ~landing & (access_times != flight.time) & (stores | flight.stores)
        of, own = of[meets], threads[meets] == flight.threads[of[meets]]
        access_epochs, access_times = access_epochs[meets], access_times[meets]
        before = (access_epochs < flight.epoch) | own & (access_times < flight.time)
        after = (access_epochs > epochs[of]) | own & (access_times > times[of])
        return bool((before | after).all())


def _numbered(*columns: np.ndarray) -> np.ndarray:
    """Equal rows get equal numbers, from 0."""
    key = columns[0].astype(np.int64)
    if key.size == 0:
        return key
    for column in columns[1:]:
        key = key * (int(column.max()) + 3) + column + 2  # threads begin with SEVERAL
    return np.unique(key, return_inverse=True)[1]


def _pairs(key: np.ndarray, stores: np.ndarray) -> int:
    """How many pairs of a store and an access have the same key."""
    return int(np.bincount(key) @ np.bincount(key, stores).astype(np.int64))
