"""Covariances of a few layers are held at a time, and the numbers are those of all at once."""

import pytest
import torch
from helpers.models import dense_model, images

import adacomcat
from adacomcat.quantization import model as quantization


def quantized(architecture, monkeypatch, most):
    """The state, and how many groups were watched at a time."""
    watched, seen = quantization._watched, []

    def counting(model, groups, run):
        seen.append(len(groups))
        return watched(model, groups, run)

    monkeypatch.setattr(quantization, "MOST_BYTES", most)
    monkeypatch.setattr(quantization, "_watched", counting)
    model = dense_model(architecture)
    torch.manual_seed(0)
    found = adacomcat.quantize(model, images(model, 40)).state_dict()
    monkeypatch.undo()
    return found, seen


@pytest.mark.parametrize(("architecture", "expected"), [
    ("vit_tiny_patch16_224", [4, 4]),  # block by block
    ("swin_tiny_patch4_window7_224", [1] * 9),  # a pass over the images for each
])
def test_few_at_a_time_give_the_same_numbers(architecture, expected, monkeypatch):
    few, seen = quantized(architecture, monkeypatch, 1)
    assert seen == expected
    monkeypatch.setattr(quantization, "encoder_parts", lambda model: None)
    every, seen = quantized(architecture, monkeypatch, 2**40)
    assert seen == [sum(expected)]
    assert all(torch.equal(value, every[name]) for name, value in few.items())
