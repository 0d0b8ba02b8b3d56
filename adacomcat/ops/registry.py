"""Every op of the package, registered with PyTorch from one entry each.

An entry of ``OPS`` gives an op its schema, its implementation, its result on fake tensors, its
gradient, what autocast does to its arguments, its flop formula, and the schemas of its compiled
kernels, ``<op>_cpu`` and ``<op>_cuda``, which the C++ extension implements.

To add an op:

1. ``reference.py``: the formula in a few lines of PyTorch, under the op's name. It returns the
   result, then the intermediates that the backward pass reuses.
2. ``autograd.py``: the backward formula, under the same name.
3. ``shapes.py``: the contract of its arguments, under the same name, and its flops.
4. Here: an entry of ``OPS``.
5. ``functions.py`` (for inference alone ``inference.py``, for decompositions
   ``decompositions.py``): the public function, which calls the entry.
6. The tests: a case in the op tests (values, gradients, opcheck, compilation, wrong arguments).

To give an op a compiled kernel: implement ``<op>_cpu`` or ``<op>_cuda`` in ``csrc``, and add the
op's name to ``CPP_OPS`` or ``CUDA_OPS`` in ``backends.py``. A backward pass by kernels goes into
``autograd_cpu.py``, or for Triton into ``kernels/<op>.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.utils.flop_counter import register_flop_formula

from adacomcat.errors import UserError
from adacomcat.ops import autograd, backends, reference, shapes, transforms

REGISTERED = torch.ops.adacomcat
_LIBRARY = torch.library.Library("adacomcat", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
# Compiled kernels of whole sublayers take two more arguments: `epsilon` of a layer norm applied to
# x first (its weight and bias are already folded into the projections), and `residual`, added last.
_SUBLAYER = "float? epsilon=None, Tensor? residual=None"


@dataclass(frozen=True)
class Op:
    """One op: its description, and the callbacks that PyTorch and ``functions.py`` call.

    Attributes:
        name: The name of the op, of its contract in ``shapes`` and of its formulas.
        arguments: The arguments, in the notation of PyTorch's schemas; the first one is a tensor.
        contract: Arguments → shapes of all results; raises where an argument is wrong.
        flops: Shapes of the arguments → floating-point operations.
        autograd: ``(ctx, *gradients of the results)`` → gradient of every argument. None for an op
            that has compiled kernels only; nothing differentiates or traces it.
        implementation: The function that runs on every device; None for the kernel that
            ``backends`` picks.
        results: How many results can be differentiated.
        intermediates: How many results follow that only the backward pass reads.
        fused: Whether the op takes ``keep_intermediates``, true when a gradient will be needed. If
            false, the intermediates are empty. Such an op obeys autocast, and the backend that ran
            it also runs its backward pass.
        kernel_arguments: Additional keyword arguments of the compiled kernels.
        float64: Whether the results are float64 whatever the arguments are.
    """

    name: str
    arguments: str
    contract: Callable[..., shapes.Shapes]
    flops: Callable[..., int] | None = None
    autograd: Callable[..., Any] | None = None
    implementation: Callable[..., Any] | None = None
    results: int = 1
    intermediates: int = 0
    fused: bool = False
    kernel_arguments: str = ""
    float64: bool = False

    def register(self) -> None:
        """Schema, implementation, fake, gradient and flops; the same for the compiled kernels."""
        if self.autograd is not None:
            keep = ["bool keep_intermediates"] if self.fused else []
            self._define(self.name, [self.arguments, *keep], self._fake)
            _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
            torch.library.register_autograd(f"adacomcat::{self.name}", self._backward,
                                            setup_context=self._setup_context, lib=_LIBRARY)
        keep = ["bool keep_intermediates=False"] if self.fused else []
        for device in backends.compiled_for(self.name):
            extra = [self.kernel_arguments] if self.kernel_arguments else []
            options = ["*", *extra, *keep] if extra or keep else []
            self._define(backends.compiled_name(self.name, device), [self.arguments, *options],
                         self._fake_kernel)

    def _define(self, name: str, arguments: list[str], fake: Callable[..., Any]) -> None:
        returns = ", ".join(["Tensor"] * (self.results + self.intermediates))
        if self.results + self.intermediates > 1:
            returns = f"({returns})"
        _LIBRARY.define(f"{name}({', '.join(arguments)}) -> {returns}", tags=_TAGS)
        torch.library.register_fake(f"adacomcat::{name}", fake, lib=_LIBRARY)
        if self.flops is not None:
            register_flop_formula(getattr(REGISTERED, name))(self.flops)

    # Calls of the public functions.

    def __call__(self, x: Tensor, *others: Any, epsilon: float | None = None,
                 residual: Tensor | None = None) -> Tensor:
        """The result of a fused op on x, or on x's layer norm if there is an epsilon.

        A kernel that ``backends`` calls directly does it all, unless gradients follow. Elsewhere
        the norm comes first, then the op, then the residual.
        """
        if isinstance(x, Proxy):  # of torch.fx
            return self._formula(x, others, epsilon, residual)
        # Small models feel every call of a function here, so the usual case is asked first.
        if torch.is_autocast_enabled("cpu") if x.is_cpu else transforms.autocast_is_on(
                x.device.type):
            x, residual, *cast = _in_autocast_dtype(x, residual, *others)
            others = tuple(cast)
        keep = torch.is_grad_enabled() and _need_gradients(x, residual, *others)
        if not keep:
            kernel = backends.direct_kernel(self.name, x)
            if kernel is not None:
                results = (kernel(x, *others) if epsilon is None and residual is None
                           else kernel(x, *others, epsilon=epsilon, residual=residual))
                return results if isinstance(results, Tensor) else results[0]
        if epsilon is not None:
            x = F.layer_norm(x, x.shape[-1:], eps=epsilon)
        if transforms.by_formula():
            return self._formula(x, others, None, residual)
        results = getattr(REGISTERED, self.name)(x, *others, keep)
        y = results if isinstance(results, Tensor) else results[0]
        if residual is None:
            return y
        if not torch.compiler.is_compiling():  # dynamo traces no message about symbolic shapes
            shapes.residual(x, residual, y.shape)
        return y + residual

    def _formula(self, x: Any, others: tuple[Any, ...], epsilon: float | None,
                 residual: Tensor | None) -> Tensor:
        """What a call gives, in PyTorch's own operators."""
        if epsilon is not None:
            x = F.layer_norm(x, x.shape[-1:], eps=epsilon)
        results = getattr(reference, self.name)(x, *others)
        y = results[0] if isinstance(results, tuple) else results
        return y if residual is None else y + residual

    def every_result(self, *arguments: Any) -> Any:
        """All results of an op that is not fused, or of its formula."""
        library = reference if transforms.by_formula() else REGISTERED
        return getattr(library, self.name)(*arguments)

    # Calls of PyTorch's dispatcher.

    @cached_property
    def _names(self) -> list[str]:
        """The names of all arguments but ``keep_intermediates``."""
        return [argument.split(" ")[1] for argument in self.arguments.split(", ")]

    @cached_property
    def _tensors(self) -> list[str]:
        """The names of the arguments that are tensors."""
        return [argument.split(" ")[1] for argument in self.arguments.split(", ")
                if argument.startswith("Tensor")]

    def _without_keep(self, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], bool]:
        """The arguments without ``keep_intermediates``, and this."""
        return (arguments[:-1], arguments[-1]) if self.fused else (arguments, True)

    def _run(self, *arguments: Any) -> Any:
        inputs, keep = self._without_keep(arguments)
        if any(transforms.has_tangent(a) for a in inputs):
            raise UserError(f"torch.ops.adacomcat.{self.name} has no forward-mode derivative; call "
                            f"the function of adacomcat.ops, and not under torch.compile")
        self.contract(*inputs)
        kernel = self.implementation or backends.kernel(self.name, inputs[0], keep)
        # Fused attention on CPUs refuses a mask that requires a gradient, even here below autograd.
        found = kernel(*(a.detach() if isinstance(a, Tensor) else a for a in inputs))
        results = (found,) if isinstance(found, Tensor) else found
        return _returned(*(t.contiguous() if keep or i < self.results else t.new_empty(0)
                           for i, t in enumerate(results)))

    def _fake(self, *arguments: Any) -> Any:
        inputs, keep = self._without_keep(arguments)
        return self._empty(inputs, keep)

    def _fake_kernel(self, *arguments: Any, keep_intermediates: bool = False,
                     **sublayer: Any) -> Any:
        return self._empty(arguments, keep_intermediates)

    def _empty(self, inputs: tuple[Any, ...], keep: bool) -> Any:
        dtype = torch.float64 if self.float64 else inputs[0].dtype
        return _returned(*(
            inputs[0].new_empty(shape if keep or i < self.results else (0,), dtype=dtype)
            for i, shape in enumerate(self.contract(*inputs))))

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        arguments, ctx.keep = self._without_keep(inputs)
        results = (output,) if isinstance(output, Tensor) else output
        intermediates = results[self.results:]
        if self.fused:
            # Chosen now: on GPUs another thread runs the backward pass, and that thread does not
            # see `use_backend`.
            ctx.backend = backends.pick(self.name, inputs[0], ctx.keep)
        ctx.mark_non_differentiable(*intermediates)
        ctx.set_materialize_grads(self.results == 1)
        named = dict(zip(self._names, arguments, strict=True))
        ctx.save_for_backward(*(named.pop(name) for name in self._tensors), *intermediates)
        ctx.options = named

    def _backward(self, ctx: Any, grad: Any, *others: Any) -> tuple[Tensor | None, ...]:
        assert self.autograd is not None
        needed = dict(zip(self._names, ctx.needs_input_grad, strict=False))
        # The formulas serve where the backward pass is itself differentiated, and masks.
        by_kernel = self.fused and ctx.keep and not torch.is_grad_enabled()
        if by_kernel and not needed.get("attn_mask"):
            launch = backends.backward_kernel(self.name, ctx.backend, grad)
            if launch is not None:
                return autograd.by_kernel(launch, ctx, self._names, grad)
        return self.autograd(ctx, grad, *others)


def _returned(*results: Tensor) -> Any:
    """A single result stands alone, as its schema says."""
    return results[0] if len(results) == 1 else results


def _in_autocast_dtype(x: Tensor, *others: Any) -> list[Any]:
    """Tensors in the dtype of x's autocast, but not float64; all else as it is."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value if value.dtype == torch.float64 else value.to(dtype)

    return [cast(value) for value in (x, *others)]


def _need_gradients(*arguments: Any) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


_ATTENTION = ("Tensor x, Tensor wq, Tensor? bq, Tensor wk, Tensor wv, Tensor wo, Tensor? bo, "
              "int num_heads, float scale, ")
_TRUNCATED_SVD = "Tensor a, int k"

OPS = {op.name: op for op in (
    # Ops of functions.py.
    Op("low_rank_linear",
       "Tensor x, Tensor v, Tensor u, Tensor? bias, str? activation, Tensor? residual",
       shapes.low_rank_linear, shapes.low_rank_flops, autograd.low_rank_linear,
       intermediates=1, fused=True),
    Op("gated_low_rank_linear", "Tensor x, Tensor v, Tensor gate, Tensor u, Tensor? bias",
       shapes.gated_low_rank_linear, shapes.gated_flops, autograd.gated_low_rank_linear,
       intermediates=1, fused=True),
    Op("low_rank_mlp",
       "Tensor x, Tensor v1, Tensor u1, Tensor? b1, Tensor v2, Tensor u2, Tensor? b2, "
       "str? activation",
       shapes.low_rank_mlp, shapes.low_rank_mlp_flops, autograd.low_rank_mlp,
       intermediates=2, fused=True, kernel_arguments=_SUBLAYER),
    Op("dense_mlp", "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str? activation",
       shapes.dense_mlp, shapes.dense_mlp_flops, autograd.dense_mlp,
       fused=True, kernel_arguments=_SUBLAYER),
    Op("low_rank_attention", f"{_ATTENTION}Tensor? attn_mask",
       shapes.low_rank_attention, shapes.attention_flops, autograd.low_rank_attention,
       intermediates=4, fused=True, kernel_arguments=_SUBLAYER),
    # Ops of inference.py.
    Op("gated_mlp",
       "Tensor x, Tensor? v1, Tensor wg, Tensor? bg, Tensor w1, Tensor? b1, Tensor? v2, Tensor w2, "
       "Tensor? b2, str? activation",
       shapes.gated_mlp, shapes.gated_mlp_flops, kernel_arguments=_SUBLAYER),
    Op("rotary_attention",
       "Tensor x, Tensor? vq, Tensor wq, Tensor? bq, Tensor? vk, Tensor wk, Tensor? bk, Tensor wv, "
       "Tensor wo, Tensor? bo, int num_heads, float scale, Tensor? sin, Tensor? cos, bool half, "
       "Tensor? attn_mask",
       shapes.rotary_attention, shapes.rotary_attention_flops, kernel_arguments=_SUBLAYER),
    Op("class_attention", f"{_ATTENTION}float epsilon",
       shapes.class_attention, shapes.class_attention_flops),
    Op("linear", "Tensor x, Tensor weight, Tensor? bias", shapes.linear, shapes.linear_flops),
    Op("patch_embedding",
       "Tensor image, Tensor weight, Tensor? bias, Tensor? prefix, Tensor? positions",
       shapes.patch_embedding, shapes.patch_embedding_flops),
    # Ops of decompositions.py.
    Op("batched_svd", _TRUNCATED_SVD, shapes.batched_svd, autograd=autograd.batched_svd,
       results=3),
    Op("low_rank_approximation", _TRUNCATED_SVD, shapes.low_rank_approximation,
       autograd=autograd.low_rank_approximation,
       implementation=reference.low_rank_approximation, results=3),
    Op("factored_svd", "Tensor a, Tensor b, int k", shapes.factored_svd,
       autograd=autograd.factored_svd, implementation=reference.factored_svd, results=3),
    Op("truncation_errors", "Tensor s", shapes.truncation_errors,
       autograd=autograd.truncation_errors, implementation=backends.truncation_errors),
    # An op of its own: it reads values, which a trace cannot.
    Op("require_distinct", "Tensor s, int k, bool zero", shapes.require_distinct,
       autograd=autograd.require_distinct, implementation=reference.distinct),
    Op("gram", "Tensor a", shapes.gram, float64=True),
    Op("eigenvalues", "Tensor a", shapes.eigenvalues),
    Op("singular_values", "Tensor a", shapes.singular_values),
)}

for _op in OPS.values():
    _op.register()
