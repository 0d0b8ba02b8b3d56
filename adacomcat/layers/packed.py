"""Modules that own their weights in the packed form that the CPU kernels read.

A weight is held once: packed. It is read back whenever it is asked for: by its name, in
``state_dict``, when the module moves, is copied or pickled, and where a formula computes it.

Weights of a quantised model lie on a grid, whole numbers times a scale for each output channel. The
scales are buffers beside them, ``wq_scale`` of ``wq``; products then round activations, too.
"""

from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adacomcat import ops
from adacomcat.layers.stock import refuse_scripting
from adacomcat.ops import backends, inference, int8, packing, transforms


class PackedModule(nn.Module):
    """A module for inference whose ``weights`` ``pack_`` may pack.

    Attributes:
        op: The op that takes the weights.
        operands: The names of its weights and biases, in its order.
        weights: Name of each weight → whether the op multiplies by its transpose. A module may lack
            one, which is then None.
        forms: Name of each packed weight → how it is read back; None for one that is also kept as
            it is, since packing rounds it. Empty if nothing is packed.
        packed: Name of each packed weight → its bytes. They are no buffers: an export would replace
            these by symbols, and no other runtime reads bytes as floats.
        kept: Name of each weight that packing rounds → the weight.
        epsilon: That of the layer norm in front.
    """

    op: ClassVar[str]
    operands: ClassVar[tuple[str, ...]]
    weights: ClassVar[dict[str, bool]]
    forms: dict[str, packing.Form | None]
    packed: dict[str, Tensor]
    kept: dict[str, Tensor]
    epsilon: float

    def __init__(self) -> None:
        super().__init__()
        self.forms, self.packed, self.kept = {}, {}, {}

    __prepare_scriptable__ = refuse_scripting

    def pack_(self) -> None:
        """Pack the weights where a CPU kernel takes them all, and free what they were packed from.

        Weights in shared memory stay as they are, for other processes read and write them.
        """
        found = {name: weight for name in self.weights
                 if (weight := getattr(self, name)) is not None}
        if self.forms or any(w.is_shared() or w.requires_grad for w in found.values()):
            return
        packed = {name: packing.pack(w, self.weights[name], self.scale_of(name))
                  for name, w in found.items()}
        forms: dict[str, packing.Form | None] = {}
        for name, one in packed.items():
            if one is None:
                return
            forms[name] = one[1]
        for name, one in packed.items():
            assert one is not None
            self.packed[name] = one[0]
            if one[1] is None:
                self.kept[name] = found[name].detach()
            self._parameters[name] = None
        self.forms = forms

    def quantize_(self, **scales: Tensor) -> None:
        """Say that the weights are whole numbers times these scales; rounding is taken away."""
        for name, scale in scales.items():
            scale = scale.float().contiguous()
            weight, transposed = self._parameters[name], self.weights[name]
            assert weight is not None
            grid = int8.Int8Weight.on_grid(weight.data if transposed else weight.data.T, scale)
            weight.data.copy_(grid.dense if transposed else grid.dense.T)
            self.register_buffer(f"{name}_scale", scale)

    def scale_of(self, name: str) -> Tensor | None:
        """The scales of a weight's output channels; None in a model that is not quantised."""
        return self._buffers.get(f"{name}_scale")

    @property
    def is_int8(self) -> bool:
        """Whether products are those of int8 numbers."""
        return self.scale_of(next(iter(self.weights))) is not None

    def unpack_(self) -> None:
        """Make the packed weights parameters again."""
        plain = {name: self._weight(name) for name in self.forms}
        self.forms, self.packed, self.kept = {}, {}, {}
        for name, weight in plain.items():
            self._parameters[name] = nn.Parameter(weight, requires_grad=False)

    def fused(self, x: Tensor, *options: Any) -> Tensor:
        """x + op(norm(x), operands, options), on the packed weights where a kernel takes them.

        Where the kernel refuses its arguments, the op says what is wrong with them.
        """
        kernel = self._packed_kernel(x)
        if kernel is not None:
            # Reading a parameter here takes a tenth of the time that the module's attribute takes.
            packed, parameters = self.packed, self._parameters
            operands = [packed[name] if name in packed else parameters[name]
                        for name in self.operands]
            with suppress(RuntimeError):
                results = kernel(x, *operands, *options, epsilon=self.epsilon, residual=x)
                return results if isinstance(results, Tensor) else results[0]
        plain = self.plain_weights()
        if self.is_int8:
            operands = [self._on_grid(name, plain[name]) for name in self.operands]
            return int8.sublayer(self.op, x, *operands, *options, epsilon=self.epsilon, residual=x)
        op = getattr(ops, self.op, None) or getattr(inference, self.op)
        return op(x, *(plain[name] for name in self.operands), *options, epsilon=self.epsilon,
                  residual=x)

    def _on_grid(self, name: str, operand: Tensor | None) -> Any:
        """A weight as whole numbers and scales, rows by output channel; a bias as it is."""
        scale = self.scale_of(name)
        if operand is None or scale is None:
            return operand
        return int8.Int8Weight.on_grid(operand if self.weights[name] else operand.T, scale)

    def _packed_kernel(self, x: Tensor) -> backends.Kernel | None:
        """The kernel that takes the packed weights and x; None where a formula has to serve."""
        if not self.forms or torch.compiler.is_compiling() or not x.is_cpu:
            return None
        if x.requires_grad and torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        return backends.direct_kernel(self.op, x)

    def plain_weights(self) -> dict[str, Any]:
        """All parameters by name, the packed ones read back."""
        if not self.forms:
            return self._parameters
        return {**self._parameters, **{name: self._weight(name) for name in self.forms}}

    def _weight(self, name: str) -> Tensor:
        form = self.forms[name]
        with transforms.untraced():  # no tracer knows how bytes become floats
            return self.kept[name].clone() if form is None else form.read(self.packed[name])

    # What PyTorch asks of a module.

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("forms", ()):
            return self._weight(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("forms", ()):
            self.unpack_()
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        plain = self.plain_weights()
        for name in self._parameters:
            weight = plain[name]
            if weight is not None:
                destination[prefix + name] = weight if keep_vars else weight.detach()
        for name in self.weights:
            scale = self.scale_of(name)
            if scale is not None:
                destination[f"{prefix}{name}_scale"] = scale

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        packed = bool(self.forms)
        self.unpack_()
        super()._load_from_state_dict(*arguments, **options)
        if packed:
            self.pack_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        packed = bool(self.forms)
        self.unpack_()
        scales = {name: scale for name in self.weights
                  if (scale := self.scale_of(name)) is not None}
        result = super()._apply(fn, recurse)
        for name, scale in scales.items():  # float32 whatever the weights become
            moved = self.scale_of(name)
            assert moved is not None
            self._buffers[f"{name}_scale"] = moved if moved.dtype == scale.dtype else scale.to(
                moved.device)
        if packed:
            self.pack_()
        return result

    def __getstate__(self) -> dict[str, Any]:
        # Another machine may have another instruction set.
        state = dict(self.__dict__)
        if self.forms:
            state["_parameters"] = {
                name: w if w is None or isinstance(w, nn.Parameter)
                else nn.Parameter(w, requires_grad=False)
                for name, w in self.plain_weights().items()}
            state |= {"forms": {}, "packed": {}, "kept": {}}
            state["_packs"] = True
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        packs = state.pop("_packs", False)
        super().__setstate__(state)
        if packs:
            self.pack_()


def unpacked(model: nn.Module) -> nn.Module:
    """``model``, changed in place: its packed weights are parameters again.

    Exporters need them: what reads packed bytes is no operator of other runtimes.
    """
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.unpack_()
    return model
