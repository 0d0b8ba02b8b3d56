"""Calibration images of every wrong kind: one line that names it, before any work."""

import pytest
import timm
import torch
from torch import nn

import adacomcat
from adacomcat.convert.calibrate import collect_statistics
from adacomcat.errors import UserError


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48,
                             num_heads=2, num_classes=4)


@pytest.mark.parametrize(("images", "says"), [
    (torch.randn(2, 4, 32, 32), r"cannot run on calibration images of shape \(4, 32, 32\)"),
    (torch.randn(2, 3, 24, 32), r"cannot run on calibration images of shape \(3, 24, 32\)"),
    (torch.randn(2, 3, 0, 0), r"cannot run on calibration images of shape \(3, 0, 0\)"),
    (torch.randn(0, 3, 32, 32), "holds no image"),
    (torch.randn(2, 3, 32, 32, dtype=torch.complex64), "normalised real numbers; got .*complex64"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "normalised real numbers; got .*uint8"),
    (torch.randn(2, 3, 32, 32).to_sparse(), "got a sparse_coo tensor"),
    (torch.randn(3, 32, 32), "got a strided tensor of 3 dimensions"),
    ([torch.randn(2, 3, 32, 32), torch.randn(2, 1, 32, 32)], r"shape \(1, 32, 32\)"),
])
def test_images_that_do_not_fit_are_one_line(images, says, model):
    with pytest.raises(UserError, match=says) as raised:
        adacomcat.compress(model, keep_params=0.5, calibration=images)
    assert "\n" not in str(raised.value)


def test_an_error_of_our_own_is_not_called_the_images_fault(model, monkeypatch):
    def fails(*args: object) -> None:
        raise RuntimeError("a collector broke")

    monkeypatch.setattr("adacomcat.convert.calibrate.LinearCollector.__call__", fails)
    with pytest.raises(RuntimeError, match="a collector broke"):
        collect_statistics(model, [torch.randn(2, 3, 32, 32)])
