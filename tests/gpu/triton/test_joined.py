"""`joined`: weights that lie one after the other in one storage become one matrix."""

import torch
from torch import nn

from adacomcat.kernels.low_rank_attention import joined
from adacomcat.layers.folding import join_


def test_weights_of_an_optimized_attention_are_one_matrix() -> None:
    weights = [nn.Parameter(torch.randn(rows, 5), requires_grad=False) for rows in (4, 4, 6)]
    expected = torch.cat([w.data for w in weights])
    assert joined(*weights) is None
    join_(*weights)
    joint = joined(*weights)
    assert joint is not None and torch.equal(joint, expected)
    assert joint.data_ptr() == weights[0].data_ptr()
    assert all(torch.equal(w, e) for w, e in zip(weights, expected.split([4, 4, 6]), strict=True))


def test_others_are_not() -> None:
    a, b, c = torch.randn(12, 5).split(4)
    assert joined(a, c, b) is None and joined(b, a, c) is None
    assert joined(a, b, c.clone()) is None
    assert joined(a, b, c[:, :4]) is None
    assert joined(a[:3], b, c) is None
    assert joined(*(t.T for t in torch.randn(5, 12).split(4, 1))) is None
    assert joined(a[:2], a[2:], b) is not None
