"""Whether something watches the operators of a call: a trace of them, or a transformation.

``torch.export``, with the exporters that start from it, and TorchScript's tracer write operators
down for programs that know PyTorch's own only. ``vmap``, ``jacrev`` and forward-mode derivatives
ask each operator for a rule; ``torch.fx`` follows values that are no tensors. For these an op runs
its formula in ``reference``; for ``torch.compile`` it stays one operator.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

_interpreters = getattr(torch._C, "_functorch").peek_interpreter_stack  # noqa: B009
_set_tracing_state = getattr(torch._C, "_set_tracing_state")  # noqa: B009
# torch 2.6 does not tell an export from a compilation; there ops stay in both.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def watched() -> bool:
    """Whether operators are traced or transformed, so that no kernel may run behind them."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed()


def by_formula() -> bool:
    """Whether an op called now has to consist of PyTorch's own operators."""
    if torch.compiler.is_compiling():
        return _is_exporting()
    return torch.jit.is_tracing() or transformed()


def autocast_is_on(device: str) -> bool:
    """Whether autocast chooses the dtypes of operators on this type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def transformed() -> bool:
    """Whether a function is transformed or differentiated forwards, outside of a compilation."""
    return forward_ad._current_level >= 0 or _interpreters() is not None


@contextmanager
def untraced() -> Iterator[None]:
    """What is computed inside, of tensors with numbers, is a constant of an export's program or of
    TorchScript's trace. Dynamo, which follows Python itself, writes it down all the same."""
    if torch.compiler.is_dynamo_compiling():
        yield
        return
    state = torch._C._get_tracing_state()
    _set_tracing_state(None)
    try:
        with _disable_current_modes():
            yield
    finally:
        _set_tracing_state(state)


def has_tangent(value: object) -> bool:
    """Whether a forward-mode derivative follows this argument."""
    return (forward_ad._current_level >= 0 and isinstance(value, Tensor)
            and forward_ad.unpack_dual(value).tangent is not None)
