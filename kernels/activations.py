"""Activations and their derivatives, elementwise in float32, for use inside kernels."""

import triton
import triton.language as tl

# Triton reads globals in kernels only as constexpr.
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x); ACTIVATION None is the identity."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z): no tanh is needed.
        x = x * tl.sigmoid(x * TWO_SQRT_2_OVER_PI * (1.0 + x * x * CUBIC))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """act'(x)."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        result = cdf + x * INVERSE_SQRT_2PI * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        square = x * x * CUBIC
        sigmoid = tl.sigmoid(x * TWO_SQRT_2_OVER_PI * (1.0 + square))
        inner = x * TWO_SQRT_2_OVER_PI * (1.0 + 3.0 * square)
        result = sigmoid * (1.0 + inner * (1.0 - sigmoid))
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        result = sigmoid * (1.0 + x * (1.0 - sigmoid))
    else:
        result = tl.where(x > 0.0, 1.0, 0.0)
    return result
