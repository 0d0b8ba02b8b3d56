"""Weights, and statistics of their inputs → low-rank factors, in float64.

All decompositions are nested: the factors of rank r are the first r columns. One spectrum gives the
squared error of every rank as its tail.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adacomcat.factorize.linalg import (
    NO_VARIANCE,
    descending_eigh,
    shrink,
    square_root,
    square_roots,
    triangle,
    triangle_of,
)
from adacomcat.ops.decompositions import (
    batched_svd,
    eigenvalues,
    gram,
    singular_values,
    truncation_errors,
)


class LinearStatistics(NamedTuple):
    """Mean (d,) and centred covariance (d, d) of the tokens that enter a linear layer."""

    mean: Tensor
    covariance: Tensor
    tokens: int

    def about_zero(self) -> "LinearStatistics":
        """E[x xᵀ] in place of the covariance: the metric of a layer without a bias, which has
        nothing to absorb the mean error."""
        moment = self.covariance + torch.outer(self.mean, self.mean)
        return LinearStatistics(torch.zeros_like(self.mean), moment, self.tokens)


class AttentionStatistics(NamedTuple):
    """Moments that whiten an attention: of its tokens x, of their averages z_h = P_h x, with P_h
    the probabilities of head h, and of the averaged values wv_h z_h, with wv (H, r, d)."""

    mean: Tensor  # (d,) of x
    covariance: Tensor  # (d, d) of x, centred
    key_covariance: Tensor  # (d, d) of x, centred per image: a softmax ignores what keys share
    value_mean: Tensor  # (H, d) of z
    value_covariance: Tensor  # (H·r, H·r) of the averaged values of all heads, centred
    value_variance: Tensor  # (H,), the mean variance of the features of z
    tokens: int


@dataclass
class LinearFactors:
    """y ≈ ((x V) Uᵀ) + b. ``errors[r]`` is E|y - ŷ|² at rank r, r = 0 … R."""

    v: Tensor  # (in, R)
    u: Tensor  # (out, R)
    bias: Tensor  # (out,) of the dense layer
    mean: Tensor  # (in,)
    errors: Tensor  # (R + 1,)

    def truncated_bias(self, rank: int) -> Tensor:
        """b + (W - Ŵ) mean: the error of a truncation then has no mean."""
        return self.bias + self.u[:, rank:] @ (self.mean @ self.v[:, rank:])


class ScoreFactors(NamedTuple):
    """Factors of the logits s (x wq_hᵀ + bq_h)(x wk_hᵀ)ᵀ of every head h."""

    wq: Tensor  # (H, R, d)
    bq: Tensor  # (H, R)
    wk: Tensor  # (H, R, d)
    errors: Tensor  # (R + 1,) of the scaled logits, summed over heads


class ValueFactors(NamedTuple):
    """Factors of the output Σ_h wo_h wv_h z_h + bo; ``bo`` holds at the full rank."""

    wv: Tensor  # (H, R, d)
    wo: Tensor  # (H, out, R)
    bo: Tensor  # (out,)
    mean: Tensor  # (H, d)
    errors: Tensor  # (R + 1,)

    def truncated_bias(self, rank: int) -> Tensor:
        """bo plus the mean of the values that the truncation drops."""
        lost = torch.einsum("hor,hrd,hd->o", self.wo[..., rank:], self.wv[:, rank:], self.mean)
        return self.bo + lost


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the columns of ``left`` and ``right`` to equal norms, as training wants them."""
    ratio = right.norm(dim=-2, keepdim=True) / left.norm(dim=-2, keepdim=True).clamp_min(1e-300)
    ratio = ratio.sqrt().clamp(1e-40, 1e40)
    return left * ratio, right / ratio


def factorize_linear(weight: Tensor, bias: Tensor | None,
                     statistics: LinearStatistics | None = None, *,
                     shrinkage: float = 0.0) -> LinearFactors:
    """Ŵ = SVD_r(W C^½) C^-½: the best rank-r map in E|x Wᵀ - x Ŵᵀ|². C = I without statistics.

    Computed by the eigenvectors of the smaller Gram matrix of W C^½: with P on the output side
    Ŵ_r = P_r P_rᵀ W, with Q on the input side Ŵ_r = W C^½ Q_r (C^-½ Q_r)ᵀ.

    Args:
        weight: W, (out, in).
        bias: (out,) or None for zeros.
        statistics: Mean and covariance of the inputs x.
        shrinkage: λ of C + λ m I, with m the mean of C's diagonal.
    """
    weight = weight.double()
    out_features, in_features = weight.shape
    mean, covariance = weight.new_zeros(in_features), None
    if statistics is not None:
        covariance = shrink(statistics.covariance.double(), shrinkage)
        mean = statistics.mean.double()
    if out_features <= in_features:
        product = gram(weight.mT) if covariance is None else weight @ covariance @ weight.mT
        energy, u = descending_eigh(product)
        v = weight.mT @ u
    elif covariance is None:
        energy, v = descending_eigh(gram(weight))
        u = weight @ v
    else:
        root, inverse = square_roots(covariance)
        whitened = weight @ root
        energy, right = descending_eigh(gram(whitened))
        u, v = whitened @ right, inverse @ right
    bias = weight.new_zeros(out_features) if bias is None else bias.double()
    return LinearFactors(*balance(v, u), bias, mean,
                         truncation_errors(energy.sqrt().unsqueeze(0)))


def linear_spectrum(weight: Tensor, bias: Tensor | None,
                    statistics: LinearStatistics | None = None, *,
                    shrinkage: float = 0.0) -> Tensor:
    """(1, R) singular values of W C^½; the squared tails are ``factorize_linear(…).errors``."""
    tall = weight.shape[0] > weight.shape[1]
    if statistics is None:
        product = gram(weight if tall else weight.mT)
    else:
        weight = weight.double()
        covariance = shrink(statistics.covariance.double(), shrinkage)
        product = (gram(weight @ square_root(covariance)) if tall
                   else weight @ covariance @ weight.mT)
    return eigenvalues(product).flip(-1).clamp_min(0).sqrt().unsqueeze(0)


def factorize_scores(wq: Tensor, bq: Tensor, wk: Tensor, scale: float,
                     statistics: AttentionStatistics | None = None, *,
                     shrinkage: float = 0.0) -> ScoreFactors:
    """M = [wq | bq]ᵀ wk per head, truncated in the metric of queries and keys.

    With thin A = C̃q^½ [wq | bq]ᵀ and B = Ck^½ wkᵀ, and A = Qa Ra, B = Qb Rb, only the
    head_dim × head_dim matrix Ra Rbᵀ = P S Tᵀ is decomposed. M̂_r = ŵqᵀ Ra⁻¹ P_r · P_rᵀ Ra wk.
    """
    wq, bq, wk = wq.double(), bq.double(), wk.double()
    r_q, r_k, queries, keys = _score_triangles(wq, bq, wk, statistics, shrinkage)
    left, singular, _ = batched_svd(r_q @ r_k.mT)
    into = torch.linalg.pinv(r_q, rtol=1e-12) @ left
    factor_q, factor_k = balance(queries @ into, keys @ (r_q.mT @ left))
    return ScoreFactors(factor_q[:, :-1].mT, factor_q[:, -1], factor_k.mT,
                        truncation_errors(singular * scale))


def score_spectrum(wq: Tensor, bq: Tensor, wk: Tensor, scale: float,
                   statistics: AttentionStatistics | None = None, *,
                   shrinkage: float = 0.0) -> Tensor:
    """(H, R) singular values of the logits' matrices, scaled."""
    r_q, r_k, *_ = _score_triangles(wq, bq, wk, statistics, shrinkage)
    return singular_values(r_q @ r_k.mT) * scale


def _score_triangles(wq: Tensor, bq: Tensor, wk: Tensor, statistics: AttentionStatistics | None,
                     shrinkage: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ra, Rb, [wq | bq]ᵀ and wkᵀ."""
    queries = torch.cat([wq, bq.unsqueeze(-1)], -1).mT  # (H, d + 1, head_dim)
    keys = wk.mT
    metric_q = metric_k = None
    if statistics is not None:
        metric_q = _augmented_moment(statistics, shrinkage)
        metric_k = shrink(statistics.key_covariance.double(), shrinkage)
    return triangle(queries, metric_q), triangle(keys, metric_k), queries, keys


def _augmented_moment(statistics: AttentionStatistics, shrinkage: float) -> Tensor:
    """E[x̃ x̃ᵀ] for x̃ = [x, 1]."""
    mean = statistics.mean.double()
    covariance = shrink(statistics.covariance.double(), shrinkage)
    moment = mean.new_ones(len(mean) + 1, len(mean) + 1)
    moment[:-1, :-1] = covariance + torch.outer(mean, mean)
    moment[:-1, -1] = moment[-1, :-1] = mean
    return moment


def factorize_values(wv: Tensor, bv: Tensor, wo: Tensor, bo: Tensor,
                     statistics: AttentionStatistics | None = None, *,
                     shrinkage: float = 0.0) -> ValueFactors:
    """wo_h wv_h ≈ Q P_r · P_rᵀ R wv_h, Q R = wo_h and P the left singular vectors of R wv_h Cz^½.

    The value bias passes the softmax unchanged (its rows sum to one), so bo + Σ_h wo_h bv_h.
    """
    wv, wo = wv.double(), wo.double()
    bias = bo.double() + torch.einsum("hor,hr->o", wo, bv.double())
    mean = wv.new_zeros(wv.shape[0], wv.shape[2])
    if statistics is not None:
        mean = statistics.value_mean.double()
    basis, inner = torch.linalg.qr(wo)
    left, singular, _ = batched_svd(inner @ _value_triangle(wv, statistics, shrinkage).mT)
    factor_o, factor_v = balance(basis @ left, wv.mT @ (inner.mT @ left))
    return ValueFactors(factor_v.mT, factor_o, bias, mean, truncation_errors(singular))


def value_spectrum(wv: Tensor, bv: Tensor, wo: Tensor, bo: Tensor,
                   statistics: AttentionStatistics | None = None, *,
                   shrinkage: float = 0.0) -> Tensor:
    """(H, R) singular values of wo_h wv_h Cz^½."""
    values = _value_triangle(wv, statistics, shrinkage)
    return singular_values(triangle(wo) @ values.mT)


def _value_triangle(wv: Tensor, statistics: AttentionStatistics | None,
                    shrinkage: float) -> Tensor:
    """T with Tᵀ T = wv (Cz + λ m I) wvᵀ, m the mean variance of z."""
    if statistics is None:
        return triangle(wv.mT)
    heads, rank = wv.shape[:2]
    joint = statistics.value_covariance.double().view(heads, rank, heads, rank)
    ridge = shrinkage * statistics.value_variance.double().clamp_min(NO_VARIANCE)
    return triangle_of(joint.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
                       + ridge[:, None, None] * (wv @ wv.mT))
