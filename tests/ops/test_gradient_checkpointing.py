"""Compressed models under gradient checkpointing: the gradients are those without it."""

import pytest
import timm
import torch
from torch import Tensor, nn

from adacomcat import RankPlan, compress
from adacomcat.layers.linear import LowRankLinear


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()
            if parameter.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_a_compressed_model(dtype: torch.dtype) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48,
                              depth=2, num_heads=3, num_classes=20)
    small = compress(model, plan=RankPlan.uniform(model, 0.8, multiple=4)).to(dtype).train()
    x = torch.randn(4, 3, 32, 32, dtype=dtype)
    expected = gradients(small, x)
    small.set_grad_checkpointing(True)
    assert_same(gradients(small, x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_op(reentrant: bool) -> None:
    layer = LowRankLinear(20, 30, 8)
    x = torch.randn(4, 5, 20, requires_grad=True)
    expected = gradients(layer, x)

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)

    wrapper = Checkpointed()
    layer.zero_grad()
    wrapper(x).square().mean().backward()
    assert_same({name: parameter.grad for name, parameter in layer.named_parameters()}, expected)
