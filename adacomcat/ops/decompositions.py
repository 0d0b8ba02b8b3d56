"""Truncated decompositions as ops, and what every truncation of a spectrum costs.

All return (u, s, v) with a ≈ u diag(s) vᵀ: s descending, the largest element of each left vector
(the first of equals) positive. float32 and float64. The gradient of a truncation needs the spectrum
that was cut off, so a backward pass decomposes anew, whole.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adacomcat.ops import autograd, backends, reference

__all__ = ["batched_svd", "factored_svd", "low_rank_approximation", "truncation_errors"]

Triple = tuple[Tensor, Tensor, Tensor]
_OPS = torch.ops.adacomcat
_LIBRARY = torch.library.Library("adacomcat", "FRAGMENT")


def batched_svd(a: Tensor, k: int | None = None) -> Triple:
    """The k largest singular triples of many small matrices.

    a (..., m, n) → u (..., m, k), s (..., k), v (..., n, k). Small singular values of matrices
    graded by columns keep their relative accuracy. ValueError names the matrix that holds NaN or
    infinity.
    """
    k = min(a.shape[-2:]) if k is None else k
    if not (torch.is_grad_enabled() and a.requires_grad) and (
            kernel := backends.direct_kernel("batched_svd", a)):
        return kernel(a, k)
    return _OPS.batched_svd(a, k)


def factored_svd(a: Tensor, b: Tensor, k: int | None = None, root_a: Tensor | None = None,
                 root_b: Tensor | None = None) -> Triple:
    """Singular triples of a bᵀ for thin factors, never their product: QR, then r × r SVD.

    a (..., m, r), b (..., n, r) → u (..., m, k), s (..., k), v (..., n, k). Roots of a metric
    on either side, root_a (..., m, m) and root_b (..., n, n), whiten: (root_a a)(root_b b)ᵀ.
    """
    a = a if root_a is None else root_a @ a
    b = b if root_b is None else root_b @ b
    return _OPS.factored_svd(a, b, _rank_limit(a, b) if k is None else k)


def low_rank_approximation(a: Tensor, k: int | None = None) -> Triple:
    """The k largest singular triples of a linear layer's weight, by the smaller Gram matrix.

    a (..., m, n) → u (..., m, k), s (..., k), v (..., n, k). Computed in float64: the error of the
    approximation is at most √ε₆₄ |a| above the best, and singular values are exact to ε₆₄ κ².
    """
    return _OPS.low_rank_approximation(a, min(a.shape[-2:]) if k is None else k)


def truncation_errors(s: Tensor) -> Tensor:
    """Squared error of every rank: errors[r] = Σ_h Σ_{i ≥ r} s_hi².

    s (..., H, R), the descending singular values of H matrices that are cut at one rank (the heads
    of an attention), zero-padded where layers differ → (..., R + 1).
    """
    return _OPS.truncation_errors(s)


def _rank_limit(a: Tensor, b: Tensor) -> int:
    return min(a.shape[-2], b.shape[-2], a.shape[-1])


def _require(condition: Any, message: Callable[[], str]) -> None:
    """torch._check, which takes longer than a decomposition of small matrices may; only what is
    symbolic needs it when it holds."""
    if condition is not True:
        torch._check(condition, message)


def _check_matrices(name: str, a: Tensor) -> None:
    _require(a.dim() >= 2, lambda: f"{name} must be a matrix or a batch of them, got shape "
                                   f"{tuple(a.shape)}")
    _require(a.dtype in (torch.float32, torch.float64),
             lambda: f"{name} is {a.dtype}; cast it to float32 or float64")


def _svd_shapes(a: Tensor, k: int) -> list[tuple[int, ...]]:
    _check_matrices("a", a)
    *lead, m, n = a.shape
    _require(0 <= k <= min(m, n), lambda: f"k must lie in 0 … {min(m, n)}, got {k}")
    return [(*lead, m, k), (*lead, k), (*lead, n, k)]


def _factored_shapes(a: Tensor, b: Tensor, k: int) -> list[tuple[int, ...]]:
    _check_matrices("a", a)
    _check_matrices("b", b)
    _require(a.dtype == b.dtype, lambda: f"b is {b.dtype} and a is {a.dtype}: cast one of them")
    *lead, m, r = a.shape
    n = b.shape[-2]
    _require(tuple(b.shape) == (*lead, n, r),
             lambda: f"b must have shape {(*lead, 'n', r)}, got {tuple(b.shape)}")
    limit = _rank_limit(a, b)
    _require(0 <= k <= limit, lambda: f"k must lie in 0 … {limit}, got {k}")
    return [(*lead, m, k), (*lead, k), (*lead, n, k)]


def _error_shapes(s: Tensor) -> list[tuple[int, ...]]:
    _check_matrices("s", s)
    return [(*s.shape[:-2], s.shape[-1] + 1)]


def _batched_svd(a: Tensor, k: int) -> Triple:
    return backends.kernel("batched_svd", a)(a, k)


def _factored_svd(a: Tensor, b: Tensor, k: int) -> Triple:
    reference.require_finite(a, "a")
    reference.require_finite(b, "b")
    basis_a, inner_a = torch.linalg.qr(a)
    basis_b, inner_b = torch.linalg.qr(b)
    u, s, v = _OPS.batched_svd(inner_a @ inner_b.mT, k)
    return reference.fix_signs(basis_a @ u, s, basis_b @ v)


def _low_rank_approximation(a: Tensor, k: int) -> Triple:
    reference.require_finite(a, "a")
    wide = a.shape[-2] < a.shape[-1]
    tall = (a.mT if wide else a).double()
    right = torch.linalg.eigh(tall.mT @ tall).eigenvectors.flip(-1)[..., :k]
    image = tall @ right  # its columns are nearly orthogonal; QR makes them so
    left, triangle = torch.linalg.qr(image)
    # The triangle is diagonal up to rounding, which its own SVD removes.
    inner_u, s, inner_v = _OPS.batched_svd(triangle, k)
    u, v = left @ inner_u, right @ inner_v
    u, s, v = reference.fix_signs(*((v, s, u) if wide else (u, s, v)))
    return u.to(a.dtype), s.to(a.dtype), v.to(a.dtype)


def _truncation_errors(s: Tensor) -> Tensor:
    # Not refused where a backend without such a kernel is in use: it is no work.
    if backends.in_use() != "cuda":
        return reference.truncation_errors(s)
    return backends.kernel("truncation_errors", s)(s)


def _require_distinct(s: Tensor, k: int, zero: bool) -> Tensor:
    reference.require_distinct(s, k, zero)
    return s.clone()


def _register(name: str, signature: str, implementation: Callable,
              shapes: Callable[..., list[tuple[int, ...]]]) -> None:
    """Schema, implementation, fake and gradient of one op; all its results have gradients."""
    _LIBRARY.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))

    def checked(*args: Any) -> Any:
        shapes(*args)
        results = implementation(*args)
        if isinstance(results, Tensor):
            return results.contiguous()
        return tuple(result.contiguous() for result in results)

    def fake(*args: Any) -> Any:
        results = tuple(args[0].new_empty(shape) for shape in shapes(*args))
        return results if len(results) > 1 else results[0]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(isinstance(output, Tensor))
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
        ctx.options = [a for a in inputs if not isinstance(a, Tensor)]

    _LIBRARY.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adacomcat::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"adacomcat::{name}", getattr(autograd, name),
                                    setup_context=setup_context, lib=_LIBRARY)


_SVD = "(Tensor a, int k) -> (Tensor, Tensor, Tensor)"
_register("batched_svd", _SVD, _batched_svd, _svd_shapes)
_register("low_rank_approximation", _SVD, _low_rank_approximation, _svd_shapes)
_register("factored_svd", "(Tensor a, Tensor b, int k) -> (Tensor, Tensor, Tensor)", _factored_svd,
          _factored_shapes)
_register("truncation_errors", "(Tensor s) -> Tensor", _truncation_errors, _error_shapes)
# Below autograd, and opaque to tracing: it looks at values.
_register("require_distinct", "(Tensor s, int k, bool zero) -> Tensor", _require_distinct,
          lambda s, *_: [tuple(s.shape)])
# Implemented in csrc/cpu and csrc/cuda under names of their own, so that `pick` stays in charge.
_LIBRARY.define(f"batched_svd_cpu{_SVD}")
# Called without the op around it, which takes longer than the SVD of a small matrix.
torch.library.register_fake(
    "adacomcat::batched_svd_cpu",
    lambda a, k: tuple(a.new_empty(shape) for shape in _svd_shapes(a, k)), lib=_LIBRARY)
_LIBRARY.define(f"batched_svd_cuda{_SVD}")
_LIBRARY.define("truncation_errors_cuda(Tensor s) -> Tensor")
# Spectra alone, of which no op is made: nothing differentiates or traces them.
for _name in ("gram", "eigenvalues", "singular_values"):
    _LIBRARY.define(f"{_name}_cpu(Tensor a) -> Tensor")
