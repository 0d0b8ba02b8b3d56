"""Weights for a file without the redundant numbers of factors: r² fewer for each factorisation.

U Vᵀ with V (k, r) is the same map as (U A⁻ᵀ)(V A)ᵀ for every invertible A, its gauge. This gauge
is V's interpolative decomposition: r rows of V become the identity and need not be stored. In the
file ``v_rest`` holds the other k - r rows and ``v_pivots`` the indices of those r. The factors of
an attention are, for each head, wk beside wq and bq, and wv beside wo.

``folder.save`` calls ``without_gauge`` where asked to; everything that reads weights calls
``with_gauge``, which leaves other weights as they are.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adacomcat.checkpoint.weights import StateDict
from adacomcat.errors import UserError
from adacomcat.factorize.interpolative import interpolate, interpolated
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear

REST, PIVOTS = "_rest", "_pivots"
SLACK = 1 << 20  # numbers that are restored in any case


class Factorization(NamedTuple):
    """One factorisation of a module, by the names of its parameters.

    factor: V (k, r), or with num_heads the heads' Vᵀ (r, k) one below the other.
    absorbed: the parameters that take V_P → how.
    """

    factor: str
    num_heads: int | None
    absorbed: dict[str, Callable[[Tensor, Tensor], Tensor]]

    def matrices(self, parameter: Tensor) -> Tensor:
        """V (k, r), or those of the heads (heads, k, r)."""
        if self.num_heads is None:
            return parameter
        return parameter.unflatten(0, (self.num_heads, -1)).mT


def without_gauge(model: nn.Module, weights: Mapping[str, Tensor]) -> StateDict:
    """``weights`` of ``model``: ``_rest`` and ``_pivots`` stand for one factor of each map."""
    found = dict(weights)
    for name, module in model.named_modules():
        for factorization in _factorizations(module):
            _strip(found, f"{name}." if name else "", factorization)
    return found


def with_gauge(weights: Mapping[str, Tensor]) -> StateDict:
    """The inverse of ``without_gauge``; weights that were not stripped stay as they are.

    Raises:
        UserError: a factor's ``_rest`` and ``_pivots`` do not fit each other.
    """
    found = dict(weights)
    stripped = [key for key in weights if key.endswith(PIVOTS)
                and key.removesuffix(PIVOTS) + REST in weights]
    _require_moderate([weights[key] for key in stripped], weights)
    for key in stripped:
        name = key.removesuffix(PIVOTS)
        found[name] = _restored(found.pop(name + REST), found.pop(key), name)
    return found


def _require_moderate(pivots: list[Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse to restore more numbers than a file of this size can have left out.

    The r² of a factorisation are at most the numbers of its other factor, which is in the file.
    """
    restored = sum(tensor.numel() * tensor.shape[-1] for tensor in pivots if tensor.ndim)
    if restored > SLACK + sum(tensor.numel() for tensor in weights.values()):
        raise UserError(f"the factors' {PIVOTS} stand for {restored:,} numbers, more than the file "
                        "has; save the model again")


def _factorizations(module: nn.Module) -> list[Factorization]:
    if isinstance(module, LowRankLinear):
        return [Factorization("v", None, {"u": _columns})]
    if isinstance(module, LowRankAttention):
        return [Factorization("wv", module.num_heads, {"wo": _head_columns}),
                Factorization("wk", module.num_heads, {"wq": _head_rows, "bq": _head_rows})]
    return []


def _strip(weights: StateDict, prefix: str, factorization: Factorization) -> None:
    """Replace the factor by its rest and pivots, where it is there and can be decomposed."""
    key = prefix + factorization.factor
    if key not in weights:  # an attention may have no factors of its scores
        return
    v = factorization.matrices(weights[key])
    k, r = v.shape[-2:]
    if not 0 < r <= k or not v.isfinite().all():
        return
    rest, pivots, mixing = interpolate(v)
    del weights[key]
    weights[key + REST], weights[key + PIVOTS] = rest, pivots.int()
    for name, absorb in factorization.absorbed.items():
        other = weights[prefix + name]
        weights[prefix + name] = absorb(other.double(), mixing).to(other.dtype).contiguous()


def _columns(u: Tensor, mixing: Tensor) -> Tensor:
    """``u`` is (out, r), ``mixing`` V_P (r, r)."""
    return u @ mixing.mT


def _head_columns(wo: Tensor, mixing: Tensor) -> Tensor:
    """``wo`` is (d, H·r), ``mixing`` V_P of each head (H, r, r)."""
    heads = wo.unflatten(1, (len(mixing), -1)).transpose(0, 1)
    return (heads @ mixing.mT).transpose(0, 1).flatten(1)


def _head_rows(rows: Tensor, mixing: Tensor) -> Tensor:
    """``rows`` is wq (H·r, d) or bq (H·r,)."""
    return (mixing @ rows.reshape(*mixing.shape[:2], -1)).reshape(rows.shape)


def _restored(rest: Tensor, pivots: Tensor, name: str) -> Tensor:
    """The factor; a leading dimension is the heads'."""
    whole = not (pivots.is_floating_point() or pivots.is_complex() or pivots.dtype == torch.bool)
    fits = (whole and pivots.ndim in (1, 2) and pivots.numel() > 0
            and rest.ndim == pivots.ndim + 1 and rest.shape[:-2] == pivots.shape[:-1]
            and rest.shape[-1] == pivots.shape[-1])
    k = rest.shape[-2] + pivots.shape[-1] if fits else 0
    if not fits or pivots.min() < 0 or pivots.max() >= k:
        raise UserError(f"{name}{REST} {tuple(rest.shape)} and {name}{PIVOTS} "
                        f"{tuple(pivots.shape)} do not belong together; save the model again")
    v = interpolated(rest, pivots)
    if v is None:
        raise UserError(f"{name}{PIVOTS} has a row twice; save the model again")
    return v if pivots.ndim == 1 else v.mT.flatten(0, 1).contiguous()
