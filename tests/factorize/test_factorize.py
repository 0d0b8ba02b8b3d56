"""Factors against definitions: float64 SVDs of the whole product, and sampled errors."""

import pytest
import torch
from timm.layers import Attention, Mlp, SwiGLU
from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.factorize.factors import (
    AttentionStatistics,
    LinearStatistics,
    balance,
    factorize_linear,
    factorize_scores,
    factorize_values,
)
from adacomcat.factorize.linalg import require_finite
from adacomcat.layers import LowRankAttention, LowRankLinear, LowRankMlp


def tokens(count: int, width: int) -> Tensor:
    """Correlated rows with a mean: what a covariance can help with."""
    mixing = torch.randn(width, width, dtype=torch.float64) * torch.logspace(0, -2, width)
    return torch.randn(count, width, dtype=torch.float64) @ mixing.T + torch.randn(width)


def statistics(x: Tensor) -> LinearStatistics:
    return LinearStatistics(x.mean(0), torch.cov(x.T, correction=0), len(x))


def attention_statistics(x: Tensor, wv: Tensor) -> tuple[AttentionStatistics, Tensor]:
    """x (B, N, d) attended with random probabilities by heads of values wv (H, r, d); also z
    (H, B·N, d)."""
    heads = len(wv)
    weights = torch.rand(heads, x.shape[0], x.shape[1], x.shape[1], dtype=x.dtype).softmax(-1)
    z = torch.einsum("hbnm,bmd->hbnd", weights, x).flatten(1, 2)
    flat, centred = x.flatten(0, 1), (x - x.mean(1, keepdim=True)).flatten(0, 1)
    found = AttentionStatistics(
        flat.mean(0), torch.cov(flat.T, correction=0), centred.T @ centred / len(centred),
        z.mean(1), torch.cov((z @ wv.mT).transpose(0, 1).flatten(1).T, correction=0),
        z.var(1, correction=0).mean(1), len(flat))
    return found, z


@pytest.mark.parametrize(("out_features", "in_features"), [(12, 20), (33, 17), (16, 16), (1, 9)])
@pytest.mark.parametrize("calibrated", [True, False])
def test_linear_errors_are_what_the_truncation_costs(
        out_features: int, in_features: int, calibrated: bool) -> None:
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    bias = torch.randn(out_features, dtype=torch.float64)
    x = tokens(500, in_features)
    factors = factorize_linear(weight, bias, statistics(x) if calibrated else None)
    for rank in (1, 3, 8, min(out_features, in_features)):
        rank = min(rank, min(out_features, in_features))
        approximated = (x @ factors.v[:, :rank]) @ factors.u[:, :rank].T
        approximated = approximated + factors.truncated_bias(rank)
        if calibrated:
            error = (x @ weight.T + bias - approximated).square().sum(1).mean()
        else:
            error = (weight - factors.u[:, :rank] @ factors.v[:, :rank].T).square().sum()
        scale = factors.errors[0]
        torch.testing.assert_close(error / scale, factors.errors[rank] / scale,
                                   rtol=1e-4, atol=1e-7)


def test_linear_truncation_is_the_best_in_the_metric_of_the_tokens() -> None:
    weight, x = torch.randn(14, 22, dtype=torch.float64), tokens(400, 22)
    found = statistics(x)
    values, vectors = torch.linalg.eigh(found.covariance)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    best = torch.linalg.svdvals(weight @ root).square()
    ours = factorize_linear(weight, None, found).errors
    for rank in (1, 5, 13):
        torch.testing.assert_close(ours[rank], best[rank:].sum(), rtol=1e-4, atol=1e-8)


def test_a_singular_covariance_still_reproduces_the_weight_at_full_rank() -> None:
    weight = torch.randn(30, 18, dtype=torch.float64)
    x = tokens(7, 18)  # fewer tokens than dimensions
    factors = factorize_linear(weight, None, statistics(x))
    torch.testing.assert_close(factors.u @ factors.v.T, weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_scores_equal_the_truncated_svd_of_the_whole_product(rank: int, calibrated: bool) -> None:
    heads, head_dim, width, scale = 3, 6, 19, 0.41
    wq, wk = torch.randn(2, heads, head_dim, width, dtype=torch.float64).unbind(0)
    bq = torch.randn(heads, head_dim, dtype=torch.float64)
    x = tokens(8 * 40, width).view(8, 40, width)
    found, _ = attention_statistics(x, wk)
    factors = factorize_scores(wq, bq, wk, scale, found if calibrated else None)

    augmented = torch.cat([x, torch.ones(8, 40, 1, dtype=x.dtype)], -1).flatten(0, 1)
    moment = augmented.T @ augmented / len(augmented)
    metric_q = moment if calibrated else torch.eye(width + 1, dtype=x.dtype)
    metric_k = found.key_covariance if calibrated else torch.eye(width, dtype=x.dtype)
    root_q, root_k = _root(metric_q), _root(metric_k)
    expected_error = 0.0
    for head in range(heads):
        product = torch.cat([wq[head], bq[head, :, None]], 1).T @ wk[head]  # (d + 1, d)
        u, s, vh = torch.linalg.svd(root_q @ product @ root_k)
        truncated = (torch.linalg.inv(root_q) @ (u[:, :rank] * s[:rank]) @ vh[:rank]
                     @ torch.linalg.inv(root_k))
        ours = torch.cat([factors.wq[head, :rank], factors.bq[head, :rank, None]], 1).T \
            @ factors.wk[head, :rank]
        torch.testing.assert_close(ours, truncated, rtol=1e-5, atol=1e-5 * truncated.abs().max())
        expected_error += scale**2 * s[rank:].square().sum()
    torch.testing.assert_close(factors.errors[rank], torch.as_tensor(expected_error),
                               rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_values_lose_what_their_errors_say_and_no_mean(rank: int) -> None:
    heads, head_dim, width, out = 2, 6, 15, 13
    wv = torch.randn(heads, head_dim, width, dtype=torch.float64)
    bv = torch.randn(heads, head_dim, dtype=torch.float64)
    wo = torch.randn(heads, out, head_dim, dtype=torch.float64)
    bo = torch.randn(out, dtype=torch.float64)
    x = tokens(6 * 50, width).view(6, 50, width)
    found, z = attention_statistics(x, wv)
    factors = factorize_values(wv, bv, wo, bo, found)

    dense = [(z[h] @ wv[h].T + bv[h]) @ wo[h].T for h in range(heads)]
    ours = [z[h] @ factors.wv[h, :rank].T @ factors.wo[h, :, :rank].T for h in range(heads)]
    difference = sum(dense) + bo - sum(ours) - factors.truncated_bias(rank)
    assert difference.mean(0).norm() <= 1e-9 * sum(dense).norm()
    per_head = sum((d - o - (d - o).mean(0)).square().sum(1).mean()
                   for d, o in zip(dense, ours, strict=True))
    torch.testing.assert_close(per_head, factors.errors[rank], rtol=1e-6, atol=1e-9)


def test_balanced_factors_have_columns_of_equal_norm_and_the_same_product() -> None:
    left, right = torch.randn(9, 4, dtype=torch.float64), 100 * torch.randn(7, 4).double()
    a, b = balance(left, right)
    torch.testing.assert_close(a.norm(dim=0), b.norm(dim=0))
    torch.testing.assert_close(a @ b.T, left @ right.T)


def test_low_rank_linear_round_trip() -> None:
    linear = torch.nn.Linear(24, 40)
    x = torch.randn(5, 24)
    whole = LowRankLinear.from_linear(linear, 24)
    torch.testing.assert_close(whole(x), linear(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.to_linear()(x), linear(x), rtol=1e-4, atol=1e-5)


def test_a_covariance_helps_the_tokens_that_it_came_from() -> None:
    linear, x = torch.nn.Linear(32, 32), tokens(2000, 32).float()
    covariance, mean = torch.cov(x.T, correction=0), x.mean(0)
    errors = {name: (linear(x) - module(x)).square().mean().item() for name, module in {
        "plain": LowRankLinear.from_linear(linear, 6),
        "whitened": LowRankLinear.from_linear(linear, 6, covariance, mean)}.items()}
    assert errors["whitened"] < 0.5 * errors["plain"]


@pytest.mark.parametrize("shape", [(20, 32), (32, 20)])
def test_without_a_bias_the_mean_belongs_to_what_is_lost(shape: tuple[int, int]) -> None:
    """Against the singular values of all outputs: no map of this rank through x loses less."""
    linear, x = torch.nn.Linear(*shape, bias=False), tokens(2000, shape[0]).float() + 3.0
    low = LowRankLinear.from_linear(linear, 4, torch.cov(x.T, correction=0), x.mean(0))
    lost = (linear(x) - low(x)).double().square().sum().item()
    least = torch.linalg.svdvals(linear(x).double())[4:].square().sum().item()
    assert lost == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("rank", [0, -1, 25, 2.5])
def test_ranks_that_cannot_be(rank: float) -> None:
    with pytest.raises(UserError, match=r"rank must lie in 1 … 24, got"):
        LowRankLinear.from_linear(torch.nn.Linear(24, 40), rank)
    with pytest.raises(UserError, match=r"rank_vo must lie in 1 … 8, got"):
        LowRankAttention.from_timm(Attention(16, num_heads=2), rank_vo=rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_their_layer(value: float) -> None:
    weight = torch.zeros(3, 3)
    weight[1, 2] = value
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.fc1.*weight"):
        require_finite("blocks.0.mlp.fc1", weight=weight)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def draw_mlp(bias: bool = True) -> Mlp:
    return Mlp(24, 40, 20, act_layer=nn.GELU, bias=bias, drop=0.1).eval()


@torch.no_grad()
def test_mlp_from_timm_at_full_rank_is_the_same_function() -> None:
    for bias in (True, False):
        mlp, x = draw_mlp(bias), torch.randn(7, 24)
        low = LowRankMlp.from_timm(mlp)
        assert (low.fc1.rank, low.fc2.rank, low.drop1.p, low.training) == (24, 20, 0.1, False)
        torch.testing.assert_close(low(x), mlp(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mlp_from_timm_has_the_best_projections_of_its_ranks() -> None:
    mlp, x = draw_mlp(), tokens(400, 24).float()
    plain = LowRankMlp.from_timm(mlp, 6, 5)
    u, s, vh = torch.linalg.svd(mlp.fc1.weight.double())
    best = (u[:, :6] * s[:6]) @ vh[:6]
    torch.testing.assert_close(plain.fc1.weight, best.float(), rtol=1e-4, atol=1e-5)
    hidden = mlp.act(mlp.fc1(x))
    aware = LowRankMlp.from_timm(mlp, 6, 5, statistics1=statistics(x.double()),
                                 statistics2=statistics(hidden.double()))
    assert {name: p.shape for name, p in aware.named_parameters()} == {
        name: p.shape for name, p in plain.named_parameters()}
    for part, inputs in (("fc1", x), ("fc2", hidden)):
        dense = getattr(mlp, part)(inputs)
        errors = [(getattr(low, part)(inputs) - dense).norm() for low in (plain, aware)]
        assert errors[1] < errors[0]


@pytest.mark.parametrize("module, ranks, message", [
    (nn.Linear(3, 3), (), "Linear is not timm's Mlp"),
    (SwiGLU(24, 40), (), "SwiGLU is not timm's Mlp"),
    (Mlp(24, 40, norm_layer=nn.LayerNorm), (), "without a norm"),
    (Mlp(24, 40, use_conv=True), (), "two linear layers"),
    (draw_mlp(), (25,), "rank1 must lie in 1 … 24, got 25"),
    (draw_mlp(), (4, 0), "rank2 must lie in 1 … 20, got 0"),
], ids=["linear", "swiglu", "norm", "convolution", "rank1", "rank2"])
def test_mlp_from_timm_refuses_with_the_reason(module: nn.Module, ranks: tuple,
                                               message: str) -> None:
    with pytest.raises(UserError, match=message):
        LowRankMlp.from_timm(module, *ranks)
