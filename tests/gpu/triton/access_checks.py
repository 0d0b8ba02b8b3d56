"""Checks every memory access of an interpreted launch, and runs its programs in random order.

Every active lane of a load or store must hit an element of an argument tensor; gaps between the
rows of a strided view are no elements. Within one launch no program may load or store an element
that another program stores, and no two lanes of one store may hit the same element.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


class KernelFault(AssertionError):
    """An access that no kernel may make."""


class Argument:
    """One tensor argument: its elements, and which program wrote and read each."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.itemsize = name, tensor.element_size()
        index = np.zeros(1, np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            index = (index[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
        span = int(index.max()) + 1 if index.size else 0
        self.start = tensor.data_ptr()
        self.stop = self.start + span * self.itemsize
        self.exists = np.zeros(span, bool)
        self.exists[index] = True
        self.writer = np.full(span, NOBODY, np.int64)
        self.reader = np.full(span, NOBODY, np.int64)

    @property
    def written(self) -> np.ndarray:
        """For each element whether it was stored."""
        return (self.writer != NOBODY)[self.exists]


class Launches:
    """All accesses of the launches inside one `checked()`."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.arguments: list[Argument] = []
        self.unwritten: list[str] = []
        self.kernels: set[str] = set()
        self.count = 0
        self.order: np.ndarray | None = None

    def begin(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self.arguments = [Argument(name, tensor) for name, tensor in named]
        self.count += 1

    def end(self, kernel: str) -> None:
        """Note outputs of which only some elements were written."""
        self.kernels.add(kernel)
        for argument in self.arguments:
            if argument.written.any() and not argument.written.all():
                self.unwritten.append(f"{kernel}: {argument.name}")

    def touch(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        active = pointers[mask.astype(bool)].astype(np.int64)
        missed, gaps = np.ones(active.size, bool), []
        for argument in self.arguments:
            inside = missed & (active >= argument.start) & (active < argument.stop)
            if inside.any():
                there = inside.copy()
                there[inside] = argument.exists[(active[inside] - argument.start)
                                                // argument.itemsize]
                gaps += [argument.name] if (inside & ~there).any() else []
                self._touch(kind, argument, active[there] - argument.start)
                missed &= ~there  # a gap of one tensor may belong to the next one
        if missed.any():
            raise KernelFault(
                f"{kind}: {int(missed.sum())} lanes out of bounds in program {_program()}; "
                f"the first one {self._nearest(int(active[missed][0]))}"
                + "".join(f"; in a gap of {name}" for name in gaps)
            )

    def _touch(self, kind: str, argument: Argument, offsets: np.ndarray) -> None:
        name, program = argument.name, _program()
        if (offsets % argument.itemsize).any():
            raise KernelFault(f"{kind}: misaligned access to {name} in program {program}")
        elements = offsets // argument.itemsize
        writer, reader = argument.writer[elements], argument.reader[elements]
        if ((writer != NOBODY) & (writer != program)).any():
            raise KernelFault(f"race: a {kind} of {name} in program {program} after a store")
        if kind == "load":
            first = (reader == NOBODY) | (reader == program)
            argument.reader[elements] = np.where(first, program, SEVERAL)
            return
        if np.unique(elements).size != elements.size:
            raise KernelFault(f"race: two lanes of one store hit one element of {name}")
        if ((reader != NOBODY) & (reader != program)).any():
            raise KernelFault(f"race: a store to {name} in program {program} after a load")
        argument.writer[elements] = program

    def _nearest(self, address: int) -> str:
        def distance(argument: Argument) -> int:
            return min(abs(address - argument.start), abs(address - argument.stop))

        near = min(self.arguments, key=distance)
        return f"at element {(address - near.start) // near.itemsize} of {near.name}"


_active: Launches | None = None


def _program() -> int:
    x, y, z = interpreter.interpreter_builder.grid_idx
    _, ny, nz = interpreter.interpreter_builder.grid_dim
    return (x * ny + y) * nz + z


@contextmanager
def checked(seed: int = 0) -> Iterator[Launches]:
    """Check every launch inside; `seed` decides the order of the programs."""
    global _active
    _active = Launches(seed)
    try:
        yield _active
    finally:
        _active = None


def install() -> None:
    """Put the checks into Triton's interpreter, once for the process."""
    _check_accesses(interpreter.InterpreterBuilder)
    _record_launches(interpreter.GridExecutor)
    _shuffle_programs(interpreter.InterpreterBuilder)


def _check_accesses(builder: type) -> None:
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self, pointers, mask, *rest):
        if _active:
            _active.touch("load", pointers.data, mask.data)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        if _active:
            _active.touch("store", pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    def no_atomics(self, *_):
        raise KernelFault("an atomic: its order, and so the result, is not determined")

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw = builder.create_atomic_cas = no_atomics


def _record_launches(executor: type) -> None:
    to_host, call = executor._init_args_hst, executor.__call__

    def named_arguments(self, arguments, keywords):
        hosted, hosted_keywords = to_host(self, arguments, keywords)
        if _active:
            pairs = [*zip(self.arg_names, hosted, strict=False), *hosted_keywords.items()]
            _active.begin([(n, v) for n, v in pairs if hasattr(v, "data_ptr")])
        return hosted, hosted_keywords

    def then_look(self, *arguments, **keywords):
        result = call(self, *arguments, **keywords)
        if _active:
            _active.end(self.fn.__name__)
        return result

    executor._init_args_hst, executor.__call__ = named_arguments, then_look


def _shuffle_programs(builder: type) -> None:
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

    def draw_order(self, nx, ny, nz):
        set_dim(self, nx, ny, nz)
        if _active:
            _active.order = _active.random.permutation(nx * ny * nz)

    def shuffled(self, x, y, z):
        if _active:
            nx, ny, nz = self.grid_dim
            assert _active.order is not None
            x, y, z = np.unravel_index(int(_active.order[(x * ny + y) * nz + z]), (nx, ny, nz))
        set_index(self, int(x), int(y), int(z))

    builder.set_grid_dim, builder.set_grid_idx = draw_order, shuffled
