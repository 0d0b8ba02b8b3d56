"""Statistics against direct sums in float64, and regressions against normal equations."""

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from adacomcat.convert.calibrate import calibrate
from adacomcat.convert.moments import Moments
from adacomcat.convert.regression import CORRECTION_SHRINKAGE, Regression
from adacomcat.convert.sequential import sequential_blocks

TINY = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def model() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.4)
    return model.eval()


def inputs_of(model: nn.Module, name: str, images: Tensor) -> Tensor:
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0].double()


def test_linear_statistics(model: nn.Module) -> None:
    images = torch.randn(40, 3, 32, 32)  # more than one batch
    found = calibrate(model, images)["blocks.1.mlp.fc2"]
    x = inputs_of(model, "blocks.1.mlp.fc2", images).flatten(0, 1)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.covariance, torch.cov(x.T, correction=0),
                               rtol=1e-4, atol=1e-6)
    assert found.tokens == len(x)


def test_attention_statistics(model: nn.Module) -> None:
    images = torch.randn(24, 3, 32, 32)
    found = calibrate(model, images)["blocks.1.attn"]
    attn = model.blocks[1].attn.double()
    x = inputs_of(model.float(), "blocks.1.attn", images)
    attn.double()
    qkv = attn.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    probabilities = (qkv[0] @ qkv[1].mT * attn.scale).softmax(-1)
    z = (probabilities @ x.unsqueeze(1)).transpose(0, 1).flatten(1, 2).detach()  # (H, B·N, d)
    centred = (x - x.mean(1, keepdim=True)).flatten(0, 1)
    torch.testing.assert_close(found.key_covariance, centred.T @ centred / len(centred),
                               rtol=1e-4, atol=1e-6)
    # Averaged tokens are told by every fourth image, averaged values by all.
    wv = attn.qkv.weight[128:].detach().unflatten(0, (2, 32))
    values = (z @ wv.mT).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.einsum("hrd,hd->hr", wv, found.value_mean).flatten(),
                               values.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.value_covariance, torch.cov(values.T, correction=0),
                               rtol=1e-3, atol=1e-6)
    part = z.unflatten(1, (24, -1))[:, [0, 4, 8, 12, 16, 20]].flatten(1, 2)
    torch.testing.assert_close(found.value_variance, part.var(1, correction=0).mean(1),
                               rtol=1e-4, atol=1e-6)
    assert (found.value_mean - z.mean(1)).norm() < 0.2 * z.mean(1).norm()


@pytest.mark.parametrize("width", [3, 300, 601])
def test_products_of_panels_are_whole_and_rows_weigh(width: int) -> None:
    """Panels are multiplied above the diagonal only; against numpy's weighted covariance."""
    rows, moments = torch.randn(900, width) + 2, Moments()
    moments.add(rows[:500], weight=3)
    moments.add(rows[500:])
    weights = [3] * 500 + [1] * 400
    expected = np.cov(rows.double().numpy().T, bias=True, fweights=weights)
    found = moments.covariance
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found, torch.tensor(expected).view(width, width),
                               rtol=1e-5, atol=1e-5)
    mixing = torch.randn(2, width)
    torch.testing.assert_close(moments.mapped(mixing).covariance,
                               torch.tensor(np.cov((rows.double() @ mixing.double().T).numpy().T,
                                                   bias=True, fweights=weights)),
                               rtol=1e-4, atol=1e-4)


def test_calibration_restores_modes_and_hooks(model: nn.Module) -> None:
    model.train()
    model.blocks[0].eval()
    calibrate(model, torch.randn(20, 3, 32, 32))
    assert model.training and not model.blocks[0].training
    assert not any(module._forward_pre_hooks for module in model.modules())


def regression(x: Tensor, y: Tensor, weight: Tensor, strength: float) -> Regression:
    fit = Regression(weight, strength)
    for rows, targets in zip(x.split(17), y.split(17), strict=True):
        fit.add(rows, targets)
    return fit


@pytest.mark.parametrize(("inputs", "outputs"), [(9, 14), (14, 9)])
def test_regression_solves_the_shrunk_least_squares(inputs: int, outputs: int) -> None:
    x, weight = torch.randn(200, inputs) + 0.5, torch.randn(outputs, inputs)
    y = x @ torch.randn(inputs, outputs) + 0.3 * torch.randn(200, outputs) + 1.0
    strength = 0.2
    found, bias = regression(x, y, weight, strength).solve_dense()

    xc, yc = (x - x.mean(0)).double(), (y - y.mean(0)).double()

    def with_ridge(strength: float) -> Tensor:
        pull = (200 * strength * xc.square().mean()).sqrt()
        return torch.cat([xc, pull * torch.eye(inputs, dtype=torch.float64)])

    # rows of √(M·ridge)·I with targets √(M·ridge)·Wᵀ pull the solution towards W
    rows = with_ridge(CORRECTION_SHRINKAGE)
    targets = torch.cat([yc, rows[200:] @ weight.T.double()])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, y.mean(0).double() - expected @ x.mean(0).double(),
                               rtol=1e-4, atol=1e-4)

    # no rank-r map is nearer to it in the metric of the inputs: compare with the projected optimum
    # (Eckart-Young on the fitted values), computed another way
    v, u, _ = regression(x, y, weight, strength).solve(4)
    rows = with_ridge(strength)
    fitted = rows @ expected.T
    best = torch.linalg.svdvals(fitted)[4:].square().sum()
    ours = (fitted - rows @ v @ u.T).square().sum()
    torch.testing.assert_close(ours, best, rtol=1e-3, atol=1e-6)


def test_blocks_go_in_sequence_only_where_they_are_known(model: nn.Module) -> None:
    assert sequential_blocks(model)
    assert not sequential_blocks(timm.create_model("vit_small_patch16_rope_224", **TINY))
    assert not sequential_blocks(
        timm.create_model("vit_tiny_patch16_224", **TINY | {"qk_norm": True}))
    model.blocks[0].mlp = nn.Identity()
    assert not sequential_blocks(model)
