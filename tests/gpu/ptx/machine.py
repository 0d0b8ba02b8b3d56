"""The machine: all threads of a grid at once, one numpy lane each.

A register is an array over all threads. At every step the threads that are furthest behind run one
instruction; threads that parted at a branch so meet again where their paths join.
"""

from collections.abc import Callable

import numpy as np

from ptx.memory import (
    EPOCH,
    UNSIGNED,
    Access,
    Fault,
    GlobalUse,
    Memory,
    SharedUse,
    Traffic,
    put,
    take,
)
from ptx.number_formats import literal
from ptx.parser import Kernel, narrowest_access, search
from ptx.trace import Trace

Lanes = np.ndarray
Mask = np.ndarray | None  # None: every thread
Step = Callable[[Mask], None]

TYPES = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8,
    "u16": np.uint16, "s16": np.int16, "b16": np.uint16,
    "u32": np.uint32, "s32": np.int32, "b32": np.uint32,
    "u64": np.uint64, "s64": np.int64, "b64": np.uint64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
GLOBAL_BASE = 0x7F0000000000
# Below 2^32: compilers keep addresses of parameters in registers of 64 bits or of 32.
PARAM_BASE = 0x7D000000
RED_ZONE = 1 << 16  # more than a tile of rows
WARP = 32


def room(size: int) -> int:
    """What `size` bytes take on the device."""
    return -(-(size + RED_ZONE) // 256) * 256


class Machine:
    """Global memory, and one kernel at a time.

    A kernel that differs from the last one in a few instructions keeps the steps of the others.
    """

    def __init__(self, size: int, count_traffic: bool = False, trace: bool = False) -> None:
        self.traffic = Traffic(size) if count_traffic else None
        self.trace = Trace() if trace else None
        self.held_back: set[int] = set()  # places whose guard has kept a thread from something
        self.shortened: set[int] = set()  # copies that have read less than they write
        self.kernel: Kernel | None = None  # the last one, and what its instructions became
        self.steps: list[tuple[str, Step | Callable | None, int] | None] = []
        self.empty(size)

    def empty(self, size: int) -> None:
        """Nothing lies in the memory, whose size may be another."""
        self.memory = Memory(size, "global")
        self.top = RED_ZONE
        self.buffers: list[int] = []

    def put(self, data: np.ndarray) -> int:
        """Copy bytes to the device, with room that nobody may touch behind; their address."""
        start = self.top
        self.top += room(data.size)
        self.memory.bytes[start : start + data.size] = data
        self.memory.allocated[start : start + data.size] = True
        self.memory.initialised[start : start + data.size] = True
        self.buffers.append(start)
        return GLOBAL_BASE + start

    def get(self, address: int, size: int) -> np.ndarray:
        start = address - GLOBAL_BASE
        return self.memory.bytes[start : start + size]

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], threads: int, arguments: list, shared: int
    ) -> None:
        """Run the whole grid, blocks of `threads`, `shared` bytes sized at the launch."""
        self._keep_steps(kernel)
        nx, ny, nz = (*grid, 1, 1)[:3]
        self.blocks, self.block_size = nx * ny * nz, threads
        self.lanes = self.blocks * threads
        self.thread = np.arange(self.lanes)
        self.block = self.thread // threads
        self.warp = self.thread // WARP
        self.first_of_block = self.block * threads
        self.of_block = (self.thread - self.first_of_block).astype(np.int32)
        self._set_registers(nx, ny, nz)
        self._set_parameters(arguments)
        # Swizzles follow absolute addresses, so each block's memory starts at a multiple of 1 KiB.
        self.shared_size = -(-(kernel.static_shared + shared) // 1024) * 1024 + 1024
        self.shared = Memory(self.shared_size * self.blocks, "shared")
        used = self.shared.allocated.reshape(self.blocks, self.shared_size)
        used[:, : kernel.static_shared + shared] = True
        self.shared_base = self.block.astype(np.int64) * self.shared_size
        # Who touched what is recorded in granules that no access splits.
        self.granules = {space: narrowest_access(kernel, space) for space in ("global", "shared")}
        self.uses = {
            "global": GlobalUse(self.memory.bytes.size // self.granules["global"]),
            "shared": SharedUse(
                self.shared.bytes.size // self.granules["shared"],
                any(ins.opcode.startswith("bar.warp.sync") for ins in kernel.code),
            ),
        }
        self.barriers = 0  # of blocks, which all pass them together
        self.warp_barriers = np.zeros(self.lanes // WARP, np.int32)
        self.fences, self.last_fence = np.zeros(self.lanes, np.int32), np.zeros(self.blocks, int)
        self.copies: list = []  # cp.async in flight
        self.copy_groups = np.zeros(self.lanes, np.int32)
        self.products: list = []  # wgmma in flight
        self.product_groups = 0
        if self.trace:
            self.trace.begin(kernel, threads)
        with np.errstate(all="ignore"):
            try:
                self._run()
            except Fault as fault:
                raise Fault(f"{fault} at {kernel.code[self.at]}") from None
        if self.products:
            raise Fault("the kernel ends with wgmma in flight")
        if any(copy.waiting.any() for copy in self.copies):
            raise Fault("the kernel ends with cp.async in flight")

    def _set_registers(self, nx: int, ny: int, nz: int) -> None:
        block = self.block
        values = {
            "%tid.x": self.thread % self.block_size, "%tid.y": 0, "%tid.z": 0,
            "%ntid.x": self.block_size, "%ntid.y": 1, "%ntid.z": 1,
            "%ctaid.x": block % nx, "%ctaid.y": block // nx % ny, "%ctaid.z": block // (nx * ny),
            "%nctaid.x": nx, "%nctaid.y": ny, "%nctaid.z": nz, "%laneid": self.thread % WARP,
        }  # fmt: skip
        self.special = {
            name: np.broadcast_to(np.asarray(value), self.lanes).astype(np.uint32)
            for name, value in values.items()
        }
        self.registers = {
            name: np.zeros(self.lanes, bool if kind == "pred" else UNSIGNED[int(kind[1:]) // 8])
            for name, kind in self.kernel.registers.items()
        }

    def _set_parameters(self, arguments: list) -> None:
        """Parameters as bytes: compilers also take their addresses."""
        raw = b""
        self.addresses = {name: self.kernel.static_shared if offset is None else offset
                          for name, offset in self.kernel.shared.items()}
        padded = [*arguments, *[0] * (len(self.kernel.parameters) - len(arguments))]
        for (name, kind), value in zip(self.kernel.parameters, padded, strict=True):
            self.addresses[name] = PARAM_BASE + len(raw)
            value = value if isinstance(value, bytes) else np.array([value], TYPES[kind]).tobytes()
            if "[" in kind and len(value) != int(kind[3:-1]):
                raise ValueError(f"{name} is {kind} and its argument has {len(value)} bytes")
            raw += value + bytes(-len(value) % 8)
        self.parameters = np.frombuffer(raw, np.uint8).copy()

    # Execution ------------------------------------------------------------------------------------

    def _keep_steps(self, kernel: Kernel) -> None:
        """The last kernel's, where this one is `with_code` of it and has the same instruction."""
        last, self.kernel = self.kernel, kernel
        if last is None or last.labels is not kernel.labels:
            self.steps = [None] * len(kernel.code)
            return
        pairs = zip(last.code, kernel.code, strict=True)
        self.steps = [step if before is now else None
                      for step, (before, now) in zip(self.steps, pairs, strict=True)]

    def _compile(self, at: int) -> tuple[str, Step | Callable | None, int]:
        """One instruction, when it is first executed."""
        from ptx.instructions import compile_instruction

        instruction = self.kernel.code[at]
        kind, step, target = compile_instruction(self, instruction)
        if self.trace and kind == "compute":
            step = self.trace.recorded(instruction, step)
        self.steps[at] = found = kind, step, target
        return found

    def _run(self) -> None:
        pc = np.zeros(self.lanes, np.int64)
        done, waiting = np.zeros(self.lanes, bool), np.zeros(self.lanes, bool)
        while not done.all():
            ready = ~(done | waiting)
            if not ready.any():
                self._release(pc, done, waiting)
                continue
            at = int(pc[ready].min())
            mask = ready & (pc == at)
            others = pc[ready & ~mask]
            limit = others.min(initial=len(self.steps))
            self._run_together(pc, done, waiting, mask, limit, at)

    def _run_together(self, pc, done, waiting, mask, limit, at) -> None:
        """Run the threads in `mask` until they part, wait, end, or reach those ahead."""
        everyone = None if mask.all() else mask
        while True:
            if at >= len(self.steps):
                done |= mask
                return
            self.at = at
            kind, step, target = self.steps[at] or self._compile(at)
            if kind == "compute":
                step(everyone)
                at += 1
            elif kind == "branch":
                taken = mask & step() if step else mask
                if not taken.any():
                    at += 1
                elif (taken == mask).all():
                    at = target
                else:
                    pc[mask], pc[taken] = at + 1, target
                    return
                if at < self.at:
                    pc[mask] = at
                    return
            elif kind == "barrier":
                pc[mask] = at + 1
                waiting |= mask
                return
            else:
                ended = mask & step() if step else mask
                done |= ended
                pc[mask] = at + 1
                return
            if at >= limit:
                pc[mask] = at
                return

    def _release(self, pc: Lanes, done: Lanes, waiting: Lanes) -> None:
        """All threads of a block have come to a barrier: let them go on."""
        place = np.where(waiting, pc, -1).reshape(self.blocks, self.block_size)
        latest = place.max(1, keepdims=True)
        if ((place != latest) & (place >= 0)).any():
            raise Fault("threads of one block wait at different barriers")
        if (waiting & np.repeat(done.reshape(self.blocks, -1).any(1), self.block_size)).any():
            raise Fault("a barrier that not all threads of the block reach")
        waiting[:] = False
        self.barriers += 1
        if self.barriers * EPOCH >= 2**31:
            raise NotImplementedError("a million barriers")
        if self.trace:
            self.trace.barrier(latest[:, 0] - 1)

    # Operands -------------------------------------------------------------------------------------

    def source(self, operand: str, kind: str) -> Callable[[], Lanes]:
        """A function that gives the operand as lanes of type `kind`, or as one value for all."""
        if kind == "pred":
            if operand.startswith("!"):
                return lambda: ~self.registers[operand[1:]]
            if operand in self.registers:
                return lambda: self.registers[operand]
            constant = np.array([int(operand, 0) != 0])
            return lambda: constant
        wanted = np.dtype(TYPES[kind])
        if operand in self.special:
            return lambda: self.special[operand].astype(UNSIGNED[wanted.itemsize]).view(wanted)
        if operand in self.registers:
            if self.registers[operand].dtype == wanted:
                return lambda: self.registers[operand]
            if self.registers[operand].dtype.itemsize == wanted.itemsize:
                return lambda: self.registers[operand].view(wanted)
            # A wider register gives its low bits.
            low = UNSIGNED[wanted.itemsize]
            return lambda: self.registers[operand].astype(low).view(wanted)
        if operand.startswith("-") and operand[1:] in self.registers:
            return lambda: -self.registers[operand[1:]].view(wanted)
        value = literal(operand, wanted, self.addresses)
        return lambda: value

    def on_all_lanes(self, value: Lanes) -> Lanes:
        """The value, or one that all threads share as many; often spares a slow broadcast."""
        shape = (self.lanes,)
        return value if value.shape == shape else np.broadcast_to(value, shape)

    def write(self, register: str, value: Lanes, mask: Mask) -> None:
        """register = value for the threads in `mask`; widened by sign if the value has one."""
        if register == "_":
            return
        kind = self.registers[register].dtype
        value = np.asarray(value)
        if value.dtype != kind:
            if value.dtype.itemsize == kind.itemsize:
                value = np.ascontiguousarray(value).view(kind)
            elif value.dtype.kind == "i":
                value = value.astype(np.dtype(f"i{kind.itemsize}")).view(kind)
            else:
                value = value.view(UNSIGNED[value.dtype.itemsize]).astype(kind)
        if value.shape != (self.lanes,):
            value = np.broadcast_to(value, (self.lanes,)).copy()
        self.registers[register] = (
            value if mask is None else np.where(mask, value, self.registers[register])
        )

    def address(self, operand: str, space: str) -> Callable[[], Lanes]:
        """Offsets into the memory of `space` for an operand such as [%rd1+16]."""
        pattern = r"^([%\w$]+)\s*(?:\+\s*(-?\w+))?"
        base, offset = search(pattern, operand.strip("[] ")).groups()
        offset = int(offset or "0", 0)
        narrow = base in self.registers and self.registers[base].dtype.itemsize == 4
        pointer = self.source(base, "u32" if narrow else "u64")
        if space == "shared":
            return lambda: pointer().astype(np.int64) + offset + self.shared_base
        start = GLOBAL_BASE if space == "global" else PARAM_BASE
        return lambda: self.on_all_lanes(pointer().astype(np.int64) + offset - start)

    # Memory ---------------------------------------------------------------------------------------

    def access(
        self, memory: Memory, offsets: Lanes, width: int, mask: Mask, kind: str
    ) -> tuple[Lanes, Lanes]:
        """Check an access of `width` bytes a thread; the threads that make it and their offsets."""
        threads = self.thread if mask is None else np.flatnonzero(mask)
        offsets = offsets if mask is None else offsets[threads]
        self.check(memory, threads, offsets, width, kind)
        return threads, offsets

    def check(
        self, memory: Memory, threads: Lanes, offsets: Lanes, width: int, kind: str,
        collective: bool = False,
    ) -> None:  # fmt: skip
        """That `threads`, in ascending order, may access `width` bytes each.

        `kind` is load, store, or copy: a store whose data arrives later. What is `collective` is
        for other threads too, whoever names the address.
        """
        if threads.size == 0:
            return
        if (offsets & (width - 1)).any():
            raise Fault(f"misaligned {kind} of {width} bytes, {memory.name}")
        outside = memory.refuse_outside(offsets, width)
        if memory is self.shared:
            outside |= offsets // self.shared_size != self.block[threads]
        if outside.any():
            raise Fault(
                f"out of bounds: {memory.name} {kind} of {width} bytes by {outside.sum()} threads"
            )
        if kind == "load" and not take(memory.initialised, offsets // width, width).all():
            raise Fault(f"{memory.name} memory is read before it is written")
        access = "load" if kind == "load" else "store"
        self.order(memory, threads, offsets, width, access, collective)
        if kind != "load":
            put(memory.initialised, offsets // width, width, kind == "store")
        if self.traffic and memory is self.memory:
            buffers = np.array(self.buffers)
            self.traffic.count(kind, offsets, width, self.warp[threads].astype(np.int64), buffers)

    def order(
        self, memory: Memory, threads: Lanes, offsets: Lanes, width: int, kind: str,
        collective: bool = False,
    ) -> None:  # fmt: skip
        """Check that a load or a store does not race with another access."""
        runs, count = offsets // width, width // self.granules[memory.name]
        if memory is self.memory:
            complaint = getattr(self.uses["global"], kind)(runs, count, threads)
        else:
            use = self.uses["shared"]
            passed = self.warp_barriers[self.warp[threads]] if use.of_warps else None
            access = Access(runs, count, self.of_block[threads], self.barriers, passed, collective)
            if self.trace:
                lanes = access.threads if collective else threads
                self.trace.touch(kind == "store", access.granules, lanes[:, None],
                                 self.block[threads][:, None])
            if kind == "store":
                complaint = use.store(access, self.fences[threads])
            else:
                complaint = use.load(access)
            if collective and not complaint:
                complaint = use.fenced(access, self.first_of_block[threads], self.fences,
                                       self.last_fence[self.block[threads]])
        if complaint:
            raise Fault(f"race: a {memory.name} {kind} {complaint}")

    def fence(self, mask: Mask) -> None:
        """fence.proxy.async: what was stored before is seen by wgmma after."""
        active = slice(None) if mask is None else mask
        self.fences[active] += 1
        self.last_fence[self.block[active]] = self.barriers
        if self.trace:
            self.trace.fence(self.at)

    def whole_warps(self, mask: Mask, what: str) -> slice | Lanes:
        """The warps that run; all their threads must."""
        if mask is None:
            return slice(None)
        lanes = mask.reshape(-1, WARP)
        active = lanes.any(1)
        if (active & ~lanes.all(1)).any():
            raise Fault(f"{what} by part of a warp")
        return np.flatnonzero(active)
