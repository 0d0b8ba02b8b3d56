"""Launchers on CPU tensors: each kernel is compiled for an architecture, and its PTX is run."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from stub_driver import compiling_for
from triton.runtime.jit import JITFunction

from ptx.machine import GLOBAL_BASE, RED_ZONE, Machine, room
from ptx.memory import NOBODY
from ptx.parser import Kernel, parse


@dataclass
class Launch:
    """One emulated launch: the kernel, its grid, the tensors by name, and the machine after it.

    `again` launches another kernel on the same tensors; it may trace it, or take this machine.
    """

    name: str
    grid: tuple[int, ...]
    kernel: Kernel
    tensors: dict[str, torch.Tensor]
    addresses: dict[str, int]
    machine: Machine
    again: Callable[..., "Launch"]

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        """The tensors that it stored to, by name."""
        writer, size = self.machine.uses["global"].writer, self.machine.granules["global"]
        starts = {name: (at - GLOBAL_BASE) // size for name, at in self.addresses.items()}
        return {name: tensor for name, tensor in self.tensors.items()
                if (writer[starts[name] : starts[name] + tensor.nbytes // size] != NOBODY).any()}


@contextmanager
def emulated(architecture: str, traffic: bool = False) -> Iterator[list[Launch]]:
    """Run every launch inside on the emulated architecture; each is appended to the list."""
    launches: list[Launch] = []
    run_on_gpu = JITFunction.run

    def run(self: JITFunction, *args, grid, warmup, **options):
        self.device_caches.clear()  # they are keyed by device, not by architecture
        compiled = run_on_gpu(self, *args, grid=grid, warmup=True, **options)
        bound = {p.name: p.default for p in self.params if p.has_default}
        bound |= dict(zip(self.arg_names, args, strict=False))
        bound |= {name: value for name, value in options.items() if name in self.arg_names}
        launches.append(_launch(self, compiled, grid, bound, _parsed(compiled), traffic))
        return compiled

    JITFunction.run = run
    try:
        with compiling_for(architecture):
            yield launches
    finally:
        JITFunction.run = run_on_gpu


_parses: dict[str, Kernel] = {}


def _parsed(compiled) -> Kernel:
    text = compiled.asm["ptx"]
    if text not in _parses:
        _parses[text] = parse(text)
    return _parses[text]


def _launch(
    function: JITFunction, compiled, grid: tuple, bound: dict, kernel: Kernel,
    traffic: bool = False, trace: bool = False, machine: Machine | None = None,
) -> Launch:  # fmt: skip
    names = function.arg_names
    folded = {names[path[0]] for path in compiled.src.constants if len(path) == 1}
    passed = {name: bound[name] for name in names if name not in folded}
    tensors = {name: value for name, value in passed.items() if torch.is_tensor(value)}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    size = RED_ZONE + sum(map(room, sizes.values()))
    if machine is None:
        machine = Machine(size, traffic, trace)
    else:
        machine.empty(size)
    storages: dict[int, tuple[int, int]] = {}
    arguments, addresses = [], {}
    for name, value in passed.items():
        if name in tensors:
            addresses[name] = value = _place(machine, value, storages)
        arguments.append(value)
    threads = 32 * compiled.metadata.num_warps
    machine.launch(kernel, grid, threads, arguments, compiled.metadata.shared)
    for storage, (address, size) in storages.items():
        ctypes.memmove(storage, machine.get(address, size).ctypes.data, size)
    again = partial(_launch, function, compiled, grid, bound)
    return Launch(function.fn.__name__, tuple(grid), kernel, tensors, addresses, machine, again)


def _place(machine: Machine, tensor: torch.Tensor, storages: dict[int, tuple[int, int]]) -> int:
    """The tensor's address on the machine; views of one storage keep their places in it."""
    storage = tensor.untyped_storage()
    key, size = storage.data_ptr(), storage.nbytes()
    if key not in storages:
        raw = (ctypes.c_char * size).from_address(key) if size else b""
        storages[key] = (machine.put(np.frombuffer(raw, np.uint8)), size)
    return storages[key][0] + tensor.storage_offset() * tensor.element_size()
