"""How several processes share the training of one model.

    average    each holds the model; gradients are averaged in one go after each step
    ddp        the same, and gradients are averaged while they are computed
    fsdp       each holds a shard of every parameter, of its gradient and of its moments (FSDP2)

A state holds whole tensors with each of them, so that any number of processes goes on from it in
any of these ways.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from adacomcat.utils.distributed import Processes


class Average:
    """Copies of the model; what the trainer calls around each pass.

    Args:
        student: the model that is trained.
        others: the teacher and averaged weights, which nobody trains.
        processes: the processes that train together.
    """

    def __init__(self, student: nn.Module, others: list[nn.Module], processes: Processes) -> None:
        self.forward: nn.Module = student  # what is called in the student's place
        self.processes = processes

    def passes(self) -> AbstractContextManager[None]:
        """Around forward and backward."""
        return nullcontext()

    def average_gradients_(self, parameters: list[nn.Parameter]) -> None:
        self.processes.average_gradients_(parameters)


class Overlapped(Average):
    """DistributedDataParallel: gradients are averaged in buckets while others are computed."""

    def __init__(self, student: nn.Module, others: list[nn.Module], processes: Processes) -> None:
        super().__init__(student, others, processes)
        # Which factors take part changes with the ranks.
        self.forward = DistributedDataParallel(student, broadcast_buffers=False,
                                               find_unused_parameters=True)

    def passes(self) -> AbstractContextManager[None]:
        return self.processes.waiting()

    def average_gradients_(self, parameters: list[nn.Parameter]) -> None:
        pass  # backward did


class Shards(Average):
    """``fully_shard``: blocks are gathered one by one, used, and dropped again."""

    def __init__(self, student: nn.Module, others: list[nn.Module], processes: Processes) -> None:
        super().__init__(student, others, processes)
        for model in (student, *others):
            shard_(model, processes)

    def passes(self) -> AbstractContextManager[None]:
        return self.processes.waiting()

    def average_gradients_(self, parameters: list[nn.Parameter]) -> None:
        pass  # backward did


KINDS = {"average": Average, "ddp": Overlapped, "fsdp": Shards}


def share(kind: str, student: nn.Module, others: list[nn.Module], processes: Processes) -> Average:
    """The way of that name; one process alone shares nothing."""
    return KINDS[kind if processes.world_size > 1 else "average"](student, others, processes)


def shard_(model: nn.Module, processes: Processes) -> None:
    """Leave a part of every parameter on each process; each block is gathered as one."""
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[0].endswith("blocks"):
            fully_shard(module, mesh=mesh)
    # The rest is dropped after each pass, too: kept, it would miss an update of its shards, and a
    # pass without gradients would leave behind what asks for none.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def finite(model: nn.Module, processes: Processes) -> bool:
    """Whether no weight is NaN or infinite on any process, which a loss need not show.

    PyTorch's attention takes NaN keys for zeros.
    """
    owned = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return not processes.any(not all(bool(p.isfinite().all()) for p in owned))


def whole(value: Any) -> Any:
    """``value`` with the tensors that its shards are parts of; every process takes part."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def load_model_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``model.load_state_dict`` of whole tensors."""
    own = model.state_dict()
    model.load_state_dict({name: _part(value, own.get(name)) for name, value in state.items()})


def load_optimizer_(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` of whole tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {index: {name: _part(value, parameters[index]) for name, value in found.items()}
               for index, found in state["state"].items()}
    optimizer.load_state_dict(state | {"state": moments})


def _part(value: Any, own: object) -> Any:
    """This process's part of ``value``, where ``own`` is the part of such a tensor."""
    if not (isinstance(own, DTensor) and isinstance(value, Tensor) and own.shape == value.shape):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
