"""The ops: public functions, schemas, shapes, gradients and flop formulas.

Each op also returns the intermediates that its backward pass reuses, if there are any; they are
empty unless `keep`.
The implementation is chosen in `backends.pick`.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from adacomcat import backends, gradients, shapes
from adacomcat.errors import UserError
from adacomcat.reference import ACTIVATIONS

__all__ = ["dense_mlp", "gated_low_rank_linear", "low_rank_attention", "low_rank_linear",
           "low_rank_mlp"]

Shapes = Callable[..., list[tuple[int, ...]]]
Flops = Callable[..., int]
_OPS = torch.ops.adacomcat
_LIBRARY = torch.library.Library("adacomcat", "DEF")
_LINEAR_ARGUMENTS = (
    "Tensor x, Tensor v, Tensor u, Tensor? bias, str? activation, Tensor? residual"
)


def low_rank_linear(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act((x V) Uᵀ + b) + residual.

    x (..., in), V (in, r), U (out, r), b (out,), residual (..., out); activation one of gelu,
    gelu_tanh, silu, relu or None.
    """
    _check_activation(activation)
    x, v, u, bias, residual = _autocast(x, v, u, bias, residual)
    keep = _needs_grad(x, v, u, bias, residual)
    if not keep and (kernel := backends.direct_kernel("low_rank_linear", x)):
        return kernel(x, v, u, bias, activation, residual)[0]
    return _OPS.low_rank_linear(x, v, u, bias, activation, residual, keep)[0]


def gated_low_rank_linear(
    x: Tensor, v: Tensor, gate: Tensor, u: Tensor, bias: Tensor | None = None
) -> Tensor:
    """((x V) * gate) Uᵀ + b.  x (..., in), V (in, r), gate (r,), U (out, r), b (out,)."""
    x, v, gate, u, bias = _autocast(x, v, gate, u, bias)
    keep = _needs_grad(x, v, gate, u, bias)
    return _OPS.gated_low_rank_linear(x, v, gate, u, bias, keep)[0]


def low_rank_mlp(
    x: Tensor,
    v1: Tensor,
    u1: Tensor,
    b1: Tensor | None,
    v2: Tensor,
    u2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    *,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """(h V2) U2ᵀ + b2 (+ residual) with h = act((x̂ V1) U1ᵀ + b1).

    x (..., in), V1 (in, r1), U1 (hidden, r1), V2 (hidden, r2), U2 (out, r2). x̂ is x, or with an
    ``epsilon`` its layer norm without weight and bias.
    """
    _check_activation(activation)
    x, v1, u1, b1, v2, u2, b2, residual = _autocast(x, v1, u1, b1, v2, u2, b2, residual)
    keep = _needs_grad(x, v1, u1, b1, v2, u2, b2, residual)
    if not keep and (kernel := backends.direct_kernel("low_rank_mlp", x)):
        return kernel(x, v1, u1, b1, v2, u2, b2, activation, epsilon=epsilon,
                      residual=residual)[0]
    x = _normalized(x, epsilon)
    y = _OPS.low_rank_mlp(x, v1, u1, b1, v2, u2, b2, activation, keep)[0]
    return y if residual is None else y + residual


def dense_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    *,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(x̂ W1ᵀ + b1) W2ᵀ + b2 (+ residual), the hidden layer computed anew for gradients.

    x (..., in), W1 (hidden, in), W2 (out, hidden). x̂ is x, or with an ``epsilon`` its layer norm
    without weight and bias.
    """
    _check_activation(activation)
    x, w1, b1, w2, b2, residual = _autocast(x, w1, b1, w2, b2, residual)
    keep = _needs_grad(x, w1, b1, w2, b2, residual)
    if not keep and (kernel := backends.direct_kernel("dense_mlp", x)):
        return kernel(x, w1, b1, w2, b2, activation, epsilon=epsilon, residual=residual)
    x = _normalized(x, epsilon)
    y = _OPS.dense_mlp(x, w1, b1, w2, b2, activation, keep)
    return y if residual is None else y + residual


def low_rank_attention(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    num_heads: int,
    scale: float,
    attn_mask: Tensor | None = None,
    *,
    epsilon: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """concat_h[softmax(q_h k_hᵀ · scale + mask) v_h] Woᵀ + bo (+ residual), from x̂.

    x (B, N, d), wq and wk (H·rq, d), wv (H·rv, d), wo (out, H·rv), rows head by head; attn_mask
    broadcasts to (B, H, N, N), bool (True = keep) or additive. x̂ is x, or with an ``epsilon`` its
    layer norm without weight and bias.
    """
    x, wq, bq, wk, wv, wo, bo, attn_mask, residual = _autocast(
        x, wq, bq, wk, wv, wo, bo, attn_mask, residual
    )
    keep = _needs_grad(x, wq, bq, wk, wv, wo, bo, attn_mask, residual)
    if not keep and (kernel := backends.direct_kernel("low_rank_attention", x)):
        return kernel(x, wq, bq, wk, wv, wo, bo, num_heads, scale, attn_mask, epsilon=epsilon,
                      residual=residual)[0]
    x = _normalized(x, epsilon)
    y = _OPS.low_rank_attention(
        x, wq, bq, wk, wv, wo, bo, num_heads, scale, attn_mask, keep
    )[0]
    return y if residual is None else y + residual


def _check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise UserError(
            f"unknown activation '{activation}'; choose one of {', '.join(ACTIVATIONS)} or None"
        )


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on for their device; float64 stays."""
    if tensors[0].is_cpu and not torch.is_autocast_enabled("cpu"):
        return tensors  # at once: it is asked at every call
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _normalized(x: Tensor, epsilon: float | None) -> Tensor:
    return x if epsilon is None else F.layer_norm(x, x.shape[-1:], eps=epsilon)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
                return gradients.by_kernel(launch, ctx, names, grad)
        return getattr(gradients, name)(ctx, grad, *rest)

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
