"""Files without the redundant numbers of factors: r² fewer for each factorisation of rank r.

U Vᵀ with V: (k, r) is the same map as (U A⁻ᵀ)(V A)ᵀ for every invertible A, its gauge. With
A = V_P⁻¹ for r rows P of V those rows become the identity, and U the columns P of the map: an
interpolative decomposition (Cheng, Gimbutas, Martinsson and Rokhlin, SIAM J. Sci. Comput. 2005).
Of V a file then holds the other k - r rows, ``*_rest``, and P, ``*_pivots``. Of an attention that
is, head by head, wk beside wq and bq, and wv beside wo.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear

REST, PIVOTS = "_rest", "_pivots"
Weights = dict[str, Tensor]


def without_gauge(model: nn.Module, weights: Mapping[str, Tensor]) -> Weights:
    """``weights`` of ``model``, of each of whose factorisations one factor lacks r rows."""
    found = dict(weights)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, LowRankLinear):
            _strip(found, prefix + "v", (prefix + "u",))
        elif isinstance(module, LowRankAttention):
            _strip(found, prefix + "wv", (prefix + "wo",), module.num_heads)
            if prefix + "wk" in found:
                _strip(found, prefix + "wk", (prefix + "wq", prefix + "bq"), module.num_heads)
    return found


def with_gauge(weights: Mapping[str, Tensor]) -> Weights:
    """All rows again; weights that were not stripped stay as they are."""
    found = dict(weights)
    for key in [key for key in weights if key.endswith(PIVOTS)]:
        name = key.removesuffix(PIVOTS)
        if name + REST in weights:
            found[name] = _filled(found.pop(name + REST), found.pop(key), name)
    return found


def _strip(weights: Weights, factor: str, others: tuple[str, ...], num_heads: int = 0) -> None:
    """Of V, or of the heads' Vᵀ one below the other; the others take what it loses."""
    v = weights[factor]
    if num_heads:
        v = v.unflatten(0, (num_heads, -1)).mT
    k, r = v.shape[-2:]
    if not 0 < r <= k or not v.isfinite().all():
        return
    basis, triangle = torch.linalg.qr(v.double())
    pivots = pivot_rows(basis)
    chosen = _rows(basis, pivots)
    interpolation = torch.linalg.solve(chosen, basis, left=False)
    left_out = torch.ones(v.shape[:-1], dtype=torch.bool).scatter_(-1, pivots, False)
    rest = interpolation[left_out].unflatten(0, (*v.shape[:-2], k - r))
    weights[factor + REST] = rest.to(v.dtype).contiguous()
    weights[factor + PIVOTS] = pivots.to(torch.int32)
    del weights[factor]
    mixing = chosen @ triangle  # V_P
    for name in others:
        other = weights[name]
        if not num_heads:
            mixed = other.double() @ mixing.mT
        elif name.endswith("wo"):
            mixed = (other.double().unflatten(1, (num_heads, -1)).transpose(0, 1)
                     @ mixing.mT).transpose(0, 1).flatten(1)
        else:  # wq and bq: rows, or numbers, of each head
            rows = other.double().reshape(num_heads, r, -1)
            mixed = (mixing @ rows).reshape(other.shape)
        weights[name] = mixed.to(other.dtype).contiguous()


def pivot_rows(basis: Tensor) -> Tensor:
    """r rows of orthonormal columns (..., k, r), ascending: those of a pivoted QR decomposition.

    The next is the one farthest from the span of those before, so that what the others are in
    terms of them stays small.
    """
    remainder, chosen = basis.clone(), []
    for _ in range(basis.shape[-1]):
        lengths = remainder.square().sum(-1)
        for index in chosen:
            lengths.scatter_(-1, index, -1.0)  # rounding must not bring one back
        chosen.append(lengths.argmax(-1, keepdim=True))
        row = _rows(remainder, chosen[-1])
        row = row / row.norm(dim=-1, keepdim=True)
        remainder = remainder - (remainder @ row.mT) @ row
    return torch.cat(chosen, -1).sort(-1).values


def _rows(matrix: Tensor, index: Tensor) -> Tensor:
    return matrix.gather(-2, index[..., None].expand(*index.shape, matrix.shape[-1]))


def _filled(rest: Tensor, pivots: Tensor, name: str) -> Tensor:
    """V from its other rows; with a leading dimension the heads' Vᵀ one below the other."""
    r, index = pivots.shape[-1], pivots.long()
    k = rest.shape[-2] + r
    fits = rest.shape[:-2] == pivots.shape[:-1] and rest.shape[-1] == r
    if not fits or pivots.min() < 0 or pivots.max() >= k:
        raise UserError(f"{name}{REST} {tuple(rest.shape)} and {name}{PIVOTS} "
                        f"{tuple(pivots.shape)} do not belong together; save the model again")
    v = rest.new_zeros(*rest.shape[:-2], k, r)
    left_out = torch.ones(v.shape[:-1], dtype=torch.bool).scatter_(-1, index, False)
    if left_out.sum() != rest.shape[:-1].numel():
        raise UserError(f"{name}{PIVOTS} has a row twice; save the model again")
    v.scatter_(-2, index[..., None].expand(*index.shape, r),
               torch.eye(r, dtype=v.dtype).expand(*index.shape, r))
    v[left_out] = rest.flatten(0, -2)
    return v if pivots.ndim == 1 else v.mT.flatten(0, 1).contiguous()
