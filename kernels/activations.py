"""Activations and their derivatives for use inside kernels, elementwise in float32.

For 16-bit outputs GELU evaluates a polynomial instead of erf. At rank 128 erf takes the scalar
units as long as the tensor cores need for the products of the same hidden unit.
"""

import triton
import triton.language as tl

# Triton reads globals in kernels only as constexpr.
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)
QUICK = tl.constexpr(1.702)


@triton.jit
def normal_tail(x, TYPE: tl.constexpr):
    """t = min(|x|, limit) and a minimax polynomial for 1 - Φ(t), which is 0 at the limit.

    The absolute errors of 1 - Φ(t) and of t (1 - Φ(t)) are 4e-4 for bfloat16 and 3e-5 for float16.
    NaN in x propagates to both results.
    """
    if TYPE == tl.bfloat16:
        t = tl.minimum(tl.abs(x), 4.04, propagate_nan=tl.PropagateNan.ALL)
        tail = -0.000628408918 * t + 0.00975703727
        tail = tail * t - 0.0569022484
        tail = tail * t + 0.138959393
        tail = tail * t - 0.0428474285
        tail = tail * t - 0.389427632
        tail = tail * t + 0.499654442
    else:
        t = tl.minimum(tl.abs(x), 4.5, propagate_nan=tl.PropagateNan.ALL)
        s = t * (2.0 / 4.5) - 1.0  # in [-1, 1]: powers of t up to 4.5⁹ would cancel
        tail = -0.0195002463 * s + 0.0296074655
        tail = tail * s + 0.0500208102
        tail = tail * s - 0.129262939
        tail = tail * s + 0.0373090096
        tail = tail * s + 0.156511366
        tail = tail * s - 0.246483967
        tail = tail * s + 0.180919319
        tail = tail * s - 0.0713419616
        tail = tail * s + 0.012221152
    return t, tail


@triton.jit
def normal_distribution(x, TYPE: tl.constexpr):
    """Φ(x), the normal distribution, to the precision of TYPE."""
    if TYPE == tl.float32:
        return 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
    t, tail = normal_tail(x, TYPE)
    return tl.where(x > 0.0, 1.0 - tail, tail)


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, TYPE: tl.constexpr):
    """act(x) in float32, to the precision of TYPE; ACTIVATION None is the identity."""
    if ACTIVATION == "gelu":
        if TYPE == tl.float32:
            x = x * normal_distribution(x, TYPE)
        else:
            t, tail = normal_tail(x, TYPE)
            x = relu(x) - t * tail
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z)
        x = x * tl.sigmoid(x * TWO_SQRT_2_OVER_PI * (1.0 + x * x * CUBIC))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(x * QUICK)
    elif ACTIVATION == "relu":
        x = relu(x)
    return x


@triton.jit
def activation_grad(x, ACTIVATION: tl.constexpr, TYPE: tl.constexpr):
    """act'(x) in float32, to the precision of TYPE."""
    if ACTIVATION == "gelu":
        density = INVERSE_SQRT_2PI * tl.exp(-0.5 * x * x)
        result = normal_distribution(x, TYPE) + x * density
    elif ACTIVATION == "gelu_tanh":
        square = x * x * CUBIC
        sigmoid = tl.sigmoid(x * TWO_SQRT_2_OVER_PI * (1.0 + square))
        inner = x * TWO_SQRT_2_OVER_PI * (1.0 + 3.0 * square)
        result = sigmoid * (1.0 + inner * (1.0 - sigmoid))
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        result = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACTIVATION == "quick_gelu":
        sigmoid = tl.sigmoid(x * QUICK)
        result = sigmoid * (1.0 + x * QUICK * (1.0 - sigmoid))
    else:
        result = tl.where(x > 0.0, 1.0, 0.0)
    return result
