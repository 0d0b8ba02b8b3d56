"""The formulas on int8, against sums of whole numbers and everything else in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tolerance import relative_error
from torch import Tensor

from adacomcat.ops import int8
from adacomcat.ops.int8 import Int8Weight

SHAPES = [(5, 7, 3), (1, 1, 1), (197, 33, 64), (2, 1536, 5), (0, 8, 4)]


def random_weight(out: int, inputs: int) -> Int8Weight:
    q = torch.randint(-127, 128, (out, inputs), dtype=torch.int8)
    return Int8Weight(q, torch.rand(out) / 50 + 0.001)


def product(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b by 64-bit integers, row by row, from the words of the contract."""
    rows = x.reshape(-1, x.shape[-1]).float().numpy()
    found = np.zeros((len(rows), len(weight.scale)))
    for row, given in zip(found, rows, strict=True):
        largest = np.abs(given).max()
        step = largest / np.float32(127)
        whole = np.zeros(len(given), int)
        if step > 1e-37:
            whole = np.rint(given * (np.float32(127) / largest)).astype(np.int64)
        sums = weight.q.to(torch.int64).numpy() @ whole
        row[:] = sums * np.float64(step) * weight.scale.double().numpy()
    y = torch.from_numpy(found).view(*x.shape[:-1], len(weight.scale))
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize(("rows", "inputs", "out"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_is_that_of_whole_numbers(rows, inputs, out, dtype):
    x, weight, bias = torch.randn(rows, inputs), random_weight(out, inputs), torch.randn(out)
    x = x.to(dtype)
    found = int8.linear(x, weight, bias)
    assert found.dtype == dtype and found.shape == (rows, out)
    if dtype != torch.float64 and rows:  # there the steps themselves have more digits
        allowed = 1e-6 if dtype == torch.float32 else 4e-3
        assert relative_error(found, product(x, weight, bias)) < allowed


def test_halves_go_to_the_even_number():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 3.49]])
    q, scale = int8.round_rows(x)
    assert q.tolist() == [[127, 0, 2, -2, 3]] and scale.item() == 1


def test_rows_of_zeros_and_of_tiny_numbers_give_the_bias():
    x = torch.zeros(2, 4)
    x[1] = 1e-45  # its scale is no float32
    weight, bias = random_weight(3, 4), torch.randn(3)
    assert torch.equal(int8.linear(x, weight, bias), bias.expand(2, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_row_does(bad):
    x = torch.randn(3, 6)
    x[1, 2] = bad
    found = int8.linear(x, random_weight(4, 6))
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_numbers_are_read_back_from_weights_on_the_grid(dtype):
    weight = random_weight(9, 40)
    weight.q[0] = torch.arange(-20, 20) * 6
    found = Int8Weight.on_grid(weight.dense.to(dtype), weight.scale)
    assert torch.equal(found.q, weight.q.float())


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def test_an_mlp_of_factors():
    x = torch.randn(2, 5, 24)
    v1, u1, v2, u2 = (random_weight(*shape) for shape in ((6, 24), (40, 6), (8, 40), (24, 8)))
    b1, b2 = torch.randn(40), torch.randn(24)
    found = int8.sublayer("low_rank_mlp", x, v1, u1, b1, v2, u2, b2, "gelu", epsilon=1e-6,
                          residual=x)
    hidden = F.gelu(product(product(layer_norm(x), v1).float(), u1, b1).float())
    expected = x + product(product(hidden, v2).float(), u2, b2)
    assert relative_error(found, expected) < 1e-4
    v1 = Int8Weight(v1.dense, torch.ones(6))  # in float the result is another
    plain = x + F.linear(F.linear(F.gelu(F.linear(
        F.linear(layer_norm(x), v1.dense), u1.dense, b1)), v2.dense), u2.dense, b2)
    assert relative_error(plain, expected) > 1e-3


def test_a_dense_mlp():
    x, w1, w2 = torch.randn(3, 4, 16), random_weight(33, 16), random_weight(16, 33)
    b1 = torch.randn(33)
    found = int8.sublayer("dense_mlp", x, w1, b1, w2, None, "relu", epsilon=1e-6, residual=x)
    expected = x + product(product(layer_norm(x), w1, b1).float().relu(), w2)
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("masked", [False, True])
def test_an_attention(masked):
    heads, rank_qk, rank_vo = 2, 3, 5
    x = torch.randn(2, 7, 12)
    wq, wk, wv, wo = (random_weight(*shape) for shape in (
        (heads * rank_qk, 12), (heads * rank_qk, 12), (heads * rank_vo, 12), (12, heads * rank_vo)))
    bq, bo = torch.randn(heads * rank_qk), torch.randn(12)
    mask = torch.randn(7, 7) if masked else None
    found = int8.sublayer("low_rank_attention", x, wq, bq, wk, wv, wo, bo, heads, 0.3, mask,
                          epsilon=1e-6, residual=x)
    normed, parts = layer_norm(x), []
    q, k, v = product(normed, wq, bq), product(normed, wk), product(normed, wv)
    for head in range(heads):
        qk = slice(head * rank_qk, (head + 1) * rank_qk)
        vo = slice(head * rank_vo, (head + 1) * rank_vo)
        logits = 0.3 * q[..., qk] @ k[..., qk].mT + (0 if mask is None else mask.double())
        parts.append(logits.softmax(-1) @ v[..., vo])
    expected = x + product(torch.cat(parts, -1).float(), wo, bo)
    assert relative_error(found, expected) < 1e-4
