"""The ops: public functions, schemas, shapes, gradients and flop formulas.

Each op also returns the intermediates that its backward pass reuses, if there are any; they are
empty unless `keep`.
The implementation is chosen in `backends.pick`.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adacomcat.ops import autograd, backends, shapes

Shapes = Callable[..., list[tuple[int, ...]]]
Flops = Callable[..., int]
_OPS = torch.ops.adacomcat
_LIBRARY = torch.library.Library("adacomcat", "DEF")
_LINEAR_ARGUMENTS = (
    "Tensor x, Tensor v, Tensor u, Tensor? bias, str? activation, Tensor? residual"
)


# Flops: two per multiply-add, one call per op and shape.


def _flops_low_rank(x, v, u) -> int:
    return 2 * prod(x[:-1]) * v[1] * (v[0] + u[0])


def _flops_low_rank_linear(x, v, u, *_, **__) -> int:
    return _flops_low_rank(x, v, u)


def _flops_gated_low_rank_linear(x, v, gate, u, *_, **__) -> int:
    return _flops_low_rank(x, v, u)


def _flops_low_rank_mlp(x, v1, u1, b1, v2, u2, *_, **__) -> int:
    return _flops_low_rank(x, v1, u1) + _flops_low_rank((*x[:-1], v2[0]), v2, u2)


def _flops_dense_mlp(x, w1, b1, w2, *_, **__) -> int:
    return 2 * prod(x[:-1]) * (prod(w1) + prod(w2))


def _flops_low_rank_attention(x, wq, bq, wk, wv, wo, *_, **__) -> int:
    projections = wq[0] * x[2] + wk[0] * x[2] + wv[0] * x[2] + wo[0] * wo[1]
    return 2 * x[0] * x[1] * (projections + x[1] * (wq[0] + wv[0]))


def _returned(*results: Tensor) -> Any:
    """A single result stands alone, as its schema says."""
    return results if len(results) > 1 else results[0]


def _register(name: str, arguments: str, results: int, shape: Shapes, flops: Flops) -> None:
    """Schema, implementation, fake, gradient and flop formula of one op."""
    returns = ", ".join(["Tensor"] * results)
    tags = (torch.Tag.pt2_compliant_tag,)
    _LIBRARY.define(f"{name}({arguments}, bool keep) -> ({returns})", tags=tags)
    parameters = getattr(_OPS, name).default._schema.arguments[:-1]
    names = [parameter.name for parameter in parameters]
    options = [parameter.name for parameter in parameters if "Tensor" not in str(parameter.type)]

    def implementation(*args: Any) -> Any:
        *inputs, keep = args
        shape(*inputs)
        x = inputs[0]
        # Fused attention on CPUs refuses a mask that requires a gradient, even here below autograd.
        inputs = [a.detach() if isinstance(a, Tensor) else a for a in inputs]
        found = backends.kernel(name, x, keep)(*inputs)
        out, *kept = found if results > 1 else (found,)
        return _returned(out.contiguous(),
                         *(t.contiguous() if keep else x.new_empty(0) for t in kept))

    def fake(*args: Any) -> Any:
        *inputs, keep = args
        out, *kept = shape(*inputs)
        x = inputs[0]
        return _returned(x.new_empty(out), *(x.new_empty(s if keep else (0,)) for s in kept))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *arguments, ctx.keep = inputs
        kept = output[1:] if results > 1 else ()
        # Chosen now: gradients on GPUs come from another thread, which knows no `use_backend`.
        ctx.backend = backends.pick(name, inputs[0], ctx.keep)
        ctx.mark_non_differentiable(*kept)
        named = dict(zip(names, arguments, strict=True))
        ctx.save_for_backward(*(named[n] for n in names if n not in options), *kept)
        ctx.options = {n: named[n] for n in options}

    def backward(ctx: Any, grad: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        # The formulas serve where the backward pass is itself differentiated, and masks.
        needed = dict(zip(names, ctx.needs_input_grad, strict=False))
        if ctx.keep and not torch.is_grad_enabled() and not needed.get("attn_mask"):
            launch = backends.backward_kernel(name, ctx.backend, grad)
            if launch is not None:
                return autograd.by_kernel(launch, ctx, names, grad)
        return getattr(autograd, name)(ctx, grad, *rest)

    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adacomcat::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"adacomcat::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
    register_flop_formula(getattr(_OPS, name))(flops)


_register(
    "low_rank_linear",
    _LINEAR_ARGUMENTS,
    2,
    shapes.low_rank_linear,
    _flops_low_rank_linear,
)
_register(
    "gated_low_rank_linear",
    "Tensor x, Tensor v, Tensor gate, Tensor u, Tensor? bias",
    2,
    shapes.gated_low_rank_linear,
    _flops_gated_low_rank_linear,
)
_register(
    "low_rank_mlp",
    "Tensor x, Tensor v1, Tensor u1, Tensor? b1, Tensor v2, Tensor u2, Tensor? b2, "
    "str? activation",
    3,
    shapes.low_rank_mlp,
    _flops_low_rank_mlp,
)
_register(
    "dense_mlp",
    "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str? activation",
    1,
    shapes.dense_mlp,
    _flops_dense_mlp,
)
_register(
    "low_rank_attention",
    "Tensor x, Tensor wq, Tensor? bq, Tensor wk, Tensor wv, Tensor wo, Tensor? bo, "
    "int num_heads, float scale, Tensor? attn_mask",
    5,
    shapes.low_rank_attention,
    _flops_low_rank_attention,
)


def _register_compiled(name: str, extra: str, shape: Shapes, flops: Flops) -> None:
    """The compiled kernel ``<op>_<device>``, under a name of its own: ``pick`` stays in charge."""
    op = getattr(_OPS, name.rpartition("_")[0]).default
    arguments = str(op._schema).partition("(")[2].partition(", bool keep")
    results = len(op._schema.returns)
    returns = ", ".join(["Tensor"] * results)
    tags = (torch.Tag.pt2_compliant_tag,)
    _LIBRARY.define(f"{name}({arguments[0]}, *, {extra}bool keep=False) -> ({returns})", tags=tags)

    def fake(x: Tensor, *args: Any, keep: bool = False, **fused: Any) -> Any:
        out, *kept = shape(x, *args)
        return _returned(x.new_empty(out), *(x.new_empty(s if keep else (0,)) for s in kept))

    torch.library.register_fake(f"adacomcat::{name}", fake, lib=_LIBRARY)
    register_flop_formula(getattr(_OPS, name))(flops)


# Whole sublayers: x is normalised first where there is an epsilon (a layer norm whose weight and
# bias are folded into the projections), and the residual is added last.
_FUSED = "float? epsilon=None, Tensor? residual=None, "
_register_compiled("low_rank_linear_cpu", "", shapes.low_rank_linear, _flops_low_rank_linear)
_register_compiled("low_rank_linear_cuda", "", shapes.low_rank_linear, _flops_low_rank_linear)
_register_compiled("low_rank_mlp_cpu", _FUSED, shapes.low_rank_mlp, _flops_low_rank_mlp)
_register_compiled("dense_mlp_cpu", _FUSED, shapes.dense_mlp, _flops_dense_mlp)
_register_compiled("low_rank_attention_cpu", _FUSED, shapes.low_rank_attention,
                   _flops_low_rank_attention)
