"""What one call of a model takes: one tensor, or several by place and name.

Inside the package, calibration images are a list of such ``Inputs``. Both kinds have a length, take
a slice of rows, and know ``split`` and ``to``.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# What data sets call their targets; no target goes into a model here.
LABELS = frozenset(("label", "labels", "label_ids"))


@dataclass(frozen=True, eq=False)
class Batch:
    """Arguments of one call. Tensors as long as the first one have a row for each image."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, Any]:
        """All arguments, those by place under their number."""
        return {str(place): value for place, value in enumerate(self.args)} | dict(self.kwargs)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.named.items() if isinstance(value, Tensor)}

    def __len__(self) -> int:
        return next((len(tensor) for tensor in self.tensors.values() if tensor.ndim), 0)

    def __getitem__(self, rows: slice) -> "Batch":
        count = len(self)
        return self.mapped(lambda tensor: tensor[rows] if has_rows(tensor, count) else tensor)

    def split(self, size: int) -> tuple["Batch", ...]:
        return tuple(self[start:start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Batch":
        """Whole numbers and masks keep their type."""
        return self.mapped(lambda tensor: tensor.to(
            device, dtype if tensor.is_floating_point() else None))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """One tensor that is given twice, as to an attention, remains one."""
        made = {id(value): change(value) for value in self.tensors.values()}

        def changed(value: Any) -> Any:
            return made.get(id(value), value)

        return Batch(tuple(map(changed, self.args)),
                     {name: changed(value) for name, value in self.kwargs.items()})


Inputs = Tensor | Batch


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What ``model`` returns for ``inputs``."""
    if isinstance(inputs, Batch):
        return model(*inputs.args, **inputs.kwargs)
    return model(inputs)


def joined(batches: Sequence[Inputs]) -> Inputs:
    """All rows in one; what has no rows is that of the first."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([batch for batch in batches if isinstance(batch, Tensor)])
    count = len(first)
    names = [batch.named for batch in batches if isinstance(batch, Batch)]
    alike: dict[int, Tensor] = {}
    whole = {name: alike.setdefault(id(tensor), torch.cat([found[name] for found in names]))
             for name, tensor in first.tensors.items() if has_rows(tensor, count)}
    named = first.named | whole
    return Batch(tuple(named[str(place)] for place in range(len(first.args))),
                 {name: named[name] for name in first.kwargs})


def has_rows(tensor: Tensor, count: int) -> bool:
    return tensor.ndim > 0 and len(tensor) == count


def shapes(inputs: Inputs) -> str:
    """The shape of one image, for messages."""
    if isinstance(inputs, Tensor):
        return f"{tuple(inputs.shape[1:])}"
    return ", ".join(f"{name} {tuple(tensor.shape[1:])}"
                     for name, tensor in inputs.tensors.items())


def inputs_of(given: object, model: nn.Module) -> object:
    """``given``, one batch of a data loader, as the arguments of ``model``; labels are left out.

    A mapping has arguments by name. Of a tuple, the first so many elements count that ``forward``
    requires, at least one. What is neither comes back as it is.
    """
    names, required = _parameters(model)
    if isinstance(given, Mapping):
        kwargs = {name: value for name, value in given.items() if name not in LABELS}
        alone = len(kwargs) == 1 and names[:1] == list(kwargs)
        return kwargs[names[0]] if alone else Batch((), kwargs)
    if isinstance(given, list | tuple) and given:
        if isinstance(given[0], Mapping | list | tuple):
            return inputs_of(given[0], model)
        args = tuple(given[:max(1, required)])
        return args[0] if len(args) == 1 else Batch(args)
    return given


def _parameters(model: nn.Module) -> tuple[list[str], int]:
    """(names of the arguments by place of ``forward``, how many of them it requires)"""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [parameter for parameter in inspect.signature(model.forward).parameters.values()
             if parameter.kind in places]
    return ([parameter.name for parameter in found],
            sum(parameter.default is inspect.Parameter.empty for parameter in found))
