"""The processes of one run that torchrun started: gloo on CPUs, nccl on GPUs."""

import atexit
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.utils.launch import launch

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; where it is alone every method is the identity."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def average_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean of each gradient over all processes, in one all-reduce.

        Parameters without a gradient are left out. Which they are changes with the ranks, and is
        the same on every process.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.world_size == 1 or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]),
                                  strict=True):
            gradient.copy_(part.view_as(gradient))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all processes."""
        return self.sum(value.detach().double()).item() / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any process."""
        if self.world_size == 1:
            return flag
        return self.sum(torch.tensor(int(flag), device=self.device)).item() > 0

    def gather_interleaved(self, shard: Tensor) -> Tensor:
        """The global batch from its shards, the rows rank::world_size of each process."""
        if self.world_size == 1:
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.world_size)]
        dist.all_gather(shards, shard.contiguous())
        return torch.stack(shards, 1).flatten(0, 1)

    def shard(self, batch: Tensor) -> Tensor:
        """This process's rows of the global batch."""
        return batch[self.rank::self.world_size]

    def broadcast_(self, module: nn.Module) -> None:
        """Every process gets the first one's parameters and buffers."""
        if self.world_size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def broadcast_object(self, value: Value) -> Value:
        """The first process's ``value``, on every process."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def start_processes(device: str | None = None) -> Processes:
    """Join the processes that torchrun describes in the environment; without it, this one alone.

    Args:
        device: torch's name of a device; None: this process's GPU where there is one.

    Raises:
        UserError: torch cannot use the device, or the environment does not say where the other
            processes are.
    """
    rank, world_size, local = launch()
    kind = str(usable_device(device))
    if kind == "cuda" and world_size > 1:
        kind = f"cuda:{local}"
        torch.cuda.set_device(local)
    if world_size == 1:
        return Processes(device=torch.device(kind))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
        # The group's threads abort the process where they outlive the interpreter.
        atexit.register(stop_processes)
    return Processes(rank, world_size, torch.device(kind))


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


def stop_processes() -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
