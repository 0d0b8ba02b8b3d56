"""The processes of one run that torchrun started: gloo on CPUs, nccl on GPUs."""

import atexit
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from adacomcat.errors import UserError, reason
from adacomcat.utils.launch import launch
from adacomcat.utils.watch import Lost, Watch, current_watch

Value = TypeVar("Value")
TIMEOUT = 300.0  # seconds that a process waits for the others


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; where it is alone every method is the identity.

    Methods that need the others raise ``Lost`` where one of them died.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    watch: Watch | None = None

    @property
    def first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def reached(self, where: str) -> None:
        """Tell the others how far this process came; they name it where it is lost."""
        if self.watch is not None:
            self.watch.reached(where)

    def waiting(self) -> AbstractContextManager[None]:
        """Around what ends only when the others take part."""
        return nullcontext() if self.watch is None else self.watch.waiting()

    def average_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean of each gradient over all processes, in one all-reduce.

        Parameters without a gradient are left out. Which they are changes with the ranks, and is
        the same on every process.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.world_size == 1 or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with self.waiting():
            dist.all_reduce(flat)
        flat /= self.world_size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]),
                                  strict=True):
            gradient.copy_(part.view_as(gradient))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            with self.waiting():
                dist.all_reduce(values)
        return values

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all processes."""
        return self.sum(value.detach().double()).item() / self.world_size

    def share(self, rows: int, total: int) -> float:
        """The weight of this process's mean over ``rows`` of ``total`` in the mean over all."""
        return rows * self.world_size / total

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any process."""
        if self.world_size == 1:
            return flag
        return self.count(flag) > 0

    def agree(self, flag: bool) -> bool:
        """Whether ``flag`` is the same on every process."""
        return self.count(flag) in (0, self.world_size)

    def count(self, flag: bool) -> int:
        """The number of processes where ``flag`` is true."""
        return int(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def mirrored(self, shard: Tensor, total: int) -> Tensor:
        """For own rows i of a global batch of ``total``: its rows total - 1 - i, in reverse order.

        Where all have equally many rows, these are the rows of one other process.
        """
        if total % self.world_size:
            rows = total - 1 - torch.arange(self.rank, total, self.world_size, device=shard.device)
            return self._gather(shard, total)[rows.flip(0)]
        other = self.world_size - 1 - self.rank
        if other == self.rank:
            return shard
        shard = shard.contiguous()
        found = torch.empty_like(shard)
        both = [dist.P2POp(dist.isend, shard, other), dist.P2POp(dist.irecv, found, other)]
        with self.waiting():
            for work in dist.batch_isend_irecv(both):
                work.wait()
        return found

    def _gather(self, shard: Tensor, total: int) -> Tensor:
        """The ``total`` rows of a global batch from its shards."""
        rows = -(-total // self.world_size)  # the last processes may have one less
        padded = torch.cat([shard, shard[:1].expand(rows - len(shard), *shard.shape[1:])])
        shards = [torch.empty_like(padded) for _ in range(self.world_size)]
        with self.waiting():
            dist.all_gather(shards, padded.contiguous())
        return torch.stack(shards, 1).flatten(0, 1)[:total]

    def broadcast_(self, module: nn.Module) -> None:
        """Every process gets the first one's parameters and buffers."""
        if self.world_size > 1:
            with self.waiting():
                for tensor in module.state_dict().values():
                    dist.broadcast(tensor, 0)

    def broadcast_object(self, value: Value) -> Value:
        """The first process's ``value``, on every process."""
        box = [value]
        if self.world_size > 1:
            with self.waiting():
                dist.broadcast_object_list(box, 0)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            with self.waiting():
                dist.barrier()


def start_processes(device: str | None = None, timeout: float = TIMEOUT) -> Processes:
    """Join the processes that torchrun describes in the environment; without it, this one alone.

    Args:
        device: torch's name of a device; None: this process's GPU where there is one.
        timeout: seconds to wait for the others, now and whenever all take part.

    Raises:
        UserError: torch cannot use the device, or the environment does not say where the other
            processes are.
        Lost: the others did not come.
    """
    rank, world_size, local = launch()
    kind = str(usable_device(device))
    if kind == "cuda" and world_size > 1:
        kind = f"cuda:{local}"
        torch.cuda.set_device(local)
    if world_size == 1:
        return Processes(device=torch.device(kind))
    if not dist.is_initialized():
        _join("nccl" if kind.startswith("cuda") else "gloo", world_size, timeout)
    return Processes(rank, world_size, torch.device(kind), _watch(rank, world_size, timeout))


def _join(backend: str, world_size: int, timeout: float) -> None:
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise Lost(f"not all {world_size} processes of the run met within {timeout:g} s "
                   f"(--timeout): {reason(error)}") from error
    # The group's threads abort the process where they outlive the interpreter.
    atexit.register(stop_processes)


def usable_device(name: str | None = None) -> torch.device:
    """The device that torch calls ``name``; None: a GPU where there is one.

    Raises:
        UserError: torch cannot use it.
    """
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
    except Exception as error:  # each kind of device has errors of its own
        reason = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"--device {name}: {reason[0]}") from error
    return found


def _watch(rank: int, world_size: int, timeout: float) -> Watch:
    """This process's watch over the group; the first call returns when every process has one."""
    watch = current_watch()
    if watch is None:
        # A connection of its own: others wait on theirs while they hold it.
        store = distributed_c10d._get_default_store().clone()
        # The store may outlive the group: a launcher starts others with it.
        box = [uuid4().hex]
        dist.broadcast_object_list(box, 0)
        watch = Watch(dist.PrefixStore(box[0], store), rank, world_size, timeout)
        with watch.waiting():
            dist.barrier()
    return watch


def stop_processes() -> None:
    """Leave the group, if there is one."""
    watch = current_watch()
    if watch is not None:
        watch.end()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
