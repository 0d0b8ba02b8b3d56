"""Models of which every process holds a shard (FSDP2), and their tensors as a whole.

Between two uses of a layer each process holds an equal part of its parameters, of their gradients
and of the optimiser's moments. The state of a run is whole all the same: any number of processes
goes on from it, with shards or without.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from adacomcat.utils.distributed import Processes


def shard_(model: nn.Module, processes: Processes) -> None:
    """Leave a part of every parameter on each process; blocks are gathered one by one."""
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[0].endswith("blocks"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(value: Any, keep: bool = True) -> Any:
    """``value`` with the tensors that its shards are parts of, on the CPU.

    Every process takes part; what those get that do not ``keep`` it has no shards.
    """
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: whole(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item, keep) for item in value)
    return value


def like(value: Tensor, own: object) -> Tensor:
    """This process's part of ``value``, where ``own`` is the part of such a tensor."""
    if not isinstance(own, DTensor) or own.shape != value.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def load_model_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``model.load_state_dict`` of whole tensors."""
    own = model.state_dict()
    model.load_state_dict({name: like(value, own.get(name)) for name, value in state.items()})


def load_optimizer_(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` of whole tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {index: {name: like(value, parameters[index]) if isinstance(value, Tensor) else value
                       for name, value in found.items()}
               for index, found in state["state"].items()}
    optimizer.load_state_dict(state | {"state": moments})


class WeightAverage(ModelEmaV3):
    """timm's average of the weights; of sharded ones each process averages its parts."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            super().apply_update_(model, decay)
            return
        means, values = ([value.to_local() if isinstance(value, DTensor) else value
                          for value in each.state_dict().values()] for each in (self.module, model))
        floating = [index for index, mean in enumerate(means) if mean.is_floating_point()]
        torch._foreach_lerp_([means[i] for i in floating], [values[i] for i in floating],
                             weight=1 - decay)
        for index in set(range(len(means))) - set(floating):
            means[index].copy_(values[index])
