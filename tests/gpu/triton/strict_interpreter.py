"""Patches Triton's interpreter so that it computes the numbers of the hardware.

The interpreter treats the bit patterns of bfloat16 as integers, truncates where the hardware
rounds, takes tf32 products exactly, and accepts tiles that no tensor core has. The patches decode
bfloat16, compute in float32 and round to nearest even; they truncate tf32 operands; they refuse
tiles that are too small and integers that overflow. TRITON_INTERPRET=1 must be set before kernels
are imported.
"""

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from ptx.number_formats import bf16_to_f32, f32_to_bf16, truncate_to_tf32
from scipy.special import erf
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

# Builder methods that compute on elements: their bfloat16 arguments are decoded, results encoded.
ELEMENTWISE = (
    "binary_op", "unary_op", "create_fma", "create_rsqrt", "create_erf", "create_clampf",
)  # fmt: skip
# Triton patches the builtins that a function's globals name; this names the language itself.
LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
# The least k of a product by the bits of its operands.
LEAST_K = {8: 32, 16: 16, 32: 8, 64: 4}


def install() -> None:
    """Patch the interpreter of this process."""
    builder: Any = interpreter.InterpreterBuilder
    semantic: Any = TritonSemantic
    language: Any = tl
    for name in ELEMENTWISE:
        setattr(builder, name, _in_float32(getattr(builder, name)))
    builder.cast_impl = _cast
    builder.create_fp_to_fp = _convert(builder.create_fp_to_fp)
    builder.create_dot = _dot(builder.create_dot)
    builder.get_bf16 = _constant
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = _least_dot
    # One call for the whole tile instead of one for each element.
    interpreter.np_erf_fp32 = lambda x: erf(x).astype(np.float32)
    interpreter.ReduceOps.sum = _sum(interpreter.ReduceOps.sum)
    # Patch triton.language once a launch, instead of once for every function called.
    patch = interpreter._patch_lang
    interpreter._patch_lang = lambda function: patch(LANGUAGE)
    interpreter.InterpretedFunction.__call__ = _call
    semantic.binary_op_sanitize_overflow_impl = _refuse_overflow
    # Cache types and shapes: to make them for each operation takes longer than the arithmetic.
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    language.block_type.__init__ = _cached_attributes(
        tl.block_type.__init__, ("shape", "numel", "name"))
    language.tensor.__init__ = _tensor


def _by_name(function: Callable) -> Callable:
    """A cache of a function of a type, by the type's name: pointer types cannot be hashed."""
    known = {}

    def wrapped(kind: tl.dtype) -> np.dtype:
        name = str(kind)
        if name not in known:
            known[name] = function(kind)
        return known[name]

    return wrapped


def _cached_attributes(initialise: Callable, attributes: tuple[str, ...]) -> Callable:
    """`initialise` that copies these attributes from the first type of equal element and shape."""
    known: dict[tuple, dict] = {}

    def wrapped(self, element_ty: tl.dtype, shape: list) -> None:
        key = str(element_ty), *(getattr(size, "value", size) for size in shape)
        self.element_ty = element_ty
        if key not in known:
            initialise(self, element_ty, shape)
            known[key] = {name: getattr(self, name) for name in attributes}
        vars(self).update(known[key])

    return wrapped


@functools.cache
def _shape(*sizes: int) -> tuple[tl.constexpr, tl.tuple]:
    return tl.constexpr(math.prod(sizes)), tl.tuple([tl.constexpr(size) for size in sizes])


def _tensor(self, handle: TensorHandle, kind: Any) -> None:
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.numel, self.shape = _shape(*(kind.shape if kind.is_block() else ()))


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _decode(value: Any) -> Any:
    if isinstance(value, TensorHandle) and _is_bf16(value):
        return TensorHandle(bf16_to_f32(value.data), tl.float32)
    return value


def _encode(handle: TensorHandle) -> TensorHandle:
    if handle.data.dtype == np.bool_:
        return handle
    return TensorHandle(f32_to_bf16(handle.data), tl.bfloat16)


def _in_float32(operation: Callable) -> Callable:
    def wrapped(self, *args):
        if any(isinstance(a, TensorHandle) and _is_bf16(a) for a in args):
            return _encode(operation(self, *(_decode(a) for a in args)))
        return operation(self, *args)

    return wrapped


def _cast(self, source: TensorHandle, to: tl.dtype) -> TensorHandle:
    data = _decode(source).data
    with np.errstate(over="ignore", invalid="ignore"):
        if to.scalar == tl.bfloat16:
            return _encode(TensorHandle(data.astype(np.float32), tl.float32))
        return TensorHandle(data.astype(interpreter._get_np_dtype(to)), to.scalar)


def _convert(operation: Callable) -> Callable:
    def wrapped(self, source, to, rounding):
        into = to.scalar == tl.bfloat16 and rounding != ir.ROUNDING_MODE.RTZ
        if into or _is_bf16(source):
            return _cast(self, source, to)
        return operation(self, source, to, rounding)

    return wrapped


def _dot(operation: Callable) -> Callable:
    def wrapped(self, a, b, accumulator, precision, imprecise):
        if _is_bf16(a) or _is_bf16(b):
            a, b = _decode(a), _decode(b)
        elif a.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle(truncate_to_tf32(t.data), tl.float32) for t in (a, b))
        elif a.data.dtype == np.float16:
            # The same sums as in float16 with a float32 accumulator, and numpy has them in BLAS.
            a, b = (TensorHandle(t.data.astype(np.float32), tl.float32) for t in (a, b))
        return operation(self, a, b, accumulator, precision, imprecise)

    return wrapped


def _constant(self, value: float) -> TensorHandle:
    return TensorHandle(f32_to_bf16(np.array([value], np.float32)), tl.bfloat16)


def _least_dot(left: tl.dtype, right: tl.dtype) -> tuple[int, int, int]:
    return 1, 1, LEAST_K.get(left.scalar.primitive_bitwidth, 16)


def _sum(operation: Callable) -> Callable:
    def wrapped(self, value):
        if value.dtype.scalar != tl.bfloat16:
            return operation(self, value)
        total = np.sum(bf16_to_f32(value.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(f32_to_bf16(np.asarray(total)), value.dtype)

    return wrapped


def _call(self, *args, **options):
    try:
        return self.rewrite()(*args, **options)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _refuse_overflow(self, left: tl.tensor, right: tl.tensor, operation: Callable) -> None:
    """Raise OverflowError for sums, differences and products; Triton's own check is slower."""
    kind = left.dtype
    if kind.int_bitwidth >= 64:
        return
    exactly = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    exact = exactly(left.handle.data, right.handle.data, dtype=np.int64)
    if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
        raise OverflowError(f"{kind} in {operation.__name__}")
