"""Released ComCAT checkpoints against an independent implementation of their architecture."""


import pytest
import timm
import torch
from helpers.comcat import (
    ARCHITECTURE,
    ARGS,
    CLASSES,
    HEADS,
    RANKS,
    SIZE,
    ReleasedViT,
    imported,
    released,
)

import adacomcat
from adacomcat.errors import UserError


@pytest.mark.parametrize("biases", [True, False])
def test_same_outputs_as_the_released_architecture(tmp_path, biases):
    reference = released(tmp_path, biases=biases)
    images = torch.randn(4, 3, SIZE, SIZE)
    with torch.inference_mode():
        expected = reference(images)
        model = imported(tmp_path)
        assert expected.std() > 0.1  # the comparison below can fail
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
        adacomcat.save(model, tmp_path / "folder")
        loaded = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True).eval()
        torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-5)
    assert model.rank_plan["blocks.0.attn.qk"] == 28 // HEADS
    assert model.rank_plan["blocks.1.attn.vo"] == 21 // HEADS


def test_every_bias_counts_and_the_key_bias_cancels(tmp_path):
    """Each released bias moves the outputs of the import as it moves the reference's."""
    reference = released(tmp_path, seed=1)
    images = torch.randn(2, 3, SIZE, SIZE)
    weights = reference.state_dict()
    before = imported(tmp_path)(images)
    for name in ("attn.{}w_ks", "attn.{}w_qs", "attn.{}w_vs", "mlp.fc1.{}first_factor"):
        key = f"blocks.0.{name.format('selected_rank_layer.')}.bias"
        changed = weights | {key: weights[key] + torch.randn_like(weights[key])}
        torch.save({"model": changed}, tmp_path / "checkpoint.pth")
        moved = (imported(tmp_path)(images) - before).abs().max()
        assert (moved == 0) == ("w_ks" in key), key


@pytest.mark.parametrize(("text", "says"), [
    ("28,19,20", "3 ranks; this model of 2 blocks needs 9"),
    ("28,19,20,24,48,21,7,9,x", "'x' is no rank"),
    ("28,19,20,24,48,21,7,9,0", "'0' is no rank"),
    ("2,19,20,24,48,21,7,9,5", "total qk rank of 2 for 3 heads"),
    ("480,19,20,24,48,21,7,9,5", "rank 160"),
    ("28,19,20,24,48,21,8,9,5", "blocks.1.mlp.fc1"),
])
def test_wrong_ranks(tmp_path, text, says):
    released(tmp_path)
    (tmp_path / "ranks.txt").write_text(text)
    with pytest.raises(UserError, match=says):
        imported(tmp_path)


@pytest.mark.parametrize("key", ["blocks.1.attn.selected_rank_layer.w_vs.weight", "norm.weight",
                                 "head.selected_rank_layer.last_factor.weight"])
def test_missing_keys_are_named(tmp_path, key):
    weights = released(tmp_path).state_dict()
    del weights[key]
    torch.save({"model": weights}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=key):
        imported(tmp_path)


def test_other_architectures_are_refused(tmp_path):
    released(tmp_path)
    with pytest.raises(UserError, match=r"cls_token \(1, 1, 48\) instead of"):
        imported(tmp_path, **ARGS | {"embed_dim": 96, "num_heads": 3})
    with pytest.raises(UserError, match="plain ViT and DeiT models; swin_tiny"):
        imported(tmp_path, "swin_tiny_patch4_window7_224", num_classes=CLASSES)
    with pytest.raises(UserError, match="did you mean deit_tiny_patch16_224"):
        imported(tmp_path, "deit_tiny_patch16_225")


def test_dense_and_pickled_checkpoints_are_refused(tmp_path):
    released(tmp_path)
    torch.save({"model": timm.create_model(ARCHITECTURE, **ARGS).state_dict()},
               tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="no ComCAT checkpoint"):
        imported(tmp_path)
    torch.save({"model": ReleasedViT(RANKS, True)}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="holds an object of helpers.comcat.ReleasedViT"):
        imported(tmp_path)
