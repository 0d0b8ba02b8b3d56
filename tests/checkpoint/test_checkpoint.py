"""Checkpoint folders: saved, loaded by us and by timm, refused where they are broken."""

import json
import os
import random
import subprocess
import sys

import pytest
import timm
import torch
from helpers.command_line import MODEL
from helpers.models import FAMILIES, compressed, dense_model, images
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import adacomcat
from adacomcat import cli
from adacomcat.checkpoint import folder
from adacomcat.errors import UserError


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    x = images(expected)
    with torch.inference_mode():
        torch.testing.assert_close(found.eval()(x), expected.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_saved_loaded_and_loaded_by_timm(architecture, tmp_path):
    model = compressed(architecture)
    adacomcat.save(model, tmp_path / "one")
    loaded = adacomcat.load(tmp_path / "one")
    by_timm = timm.create_model(f"local-dir:{tmp_path}/one", pretrained=True)
    assert_same(loaded, model)
    assert_same(by_timm, model)
    assert any(rank != "dense" for rank in loaded.rank_plan.ranks.values())
    adacomcat.save(by_timm, tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_dense_models_save_and_load_and_are_compressed_after(tmp_path):
    model = dense_model()
    adacomcat.save(model, tmp_path / "dense")
    loaded = adacomcat.load(tmp_path / "dense")
    assert_same(loaded, model)
    assert_same(timm.create_model(f"local-dir:{tmp_path}/dense", pretrained=True), model)
    adacomcat.save(adacomcat.compress(loaded, keep_params=0.6), tmp_path / "small")
    assert adacomcat.load(tmp_path / "small").rank_plan.ranks


def test_a_folder_needs_no_more_than_architecture_and_arguments(tmp_path):
    model = dense_model()
    adacomcat.save(model, tmp_path / "dense")
    config = {"architecture": "vit_tiny_patch16_224", "dataset": "some",
              "model_args": FAMILIES["vit_tiny_patch16_224"]}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    loaded = adacomcat.load(tmp_path / "dense")
    assert_same(loaded, model)
    adacomcat.save(loaded, tmp_path / "again")
    assert_same(timm.create_model(f"local-dir:{tmp_path}/again", pretrained=True), model)


def test_changes_after_construction_are_saved(tmp_path):
    model = dense_model()
    model.reset_classifier(5, global_pool="avg")
    adacomcat.save(model, tmp_path / "reset")
    assert_same(adacomcat.load(tmp_path / "reset"), model)


def test_what_a_state_dict_does_not_tell_is_noticed(tmp_path):
    model = dense_model()
    model.blocks[0].mlp.act = nn.ReLU()
    with pytest.raises(UserError, match="computes something else"):
        adacomcat.save(model, tmp_path / "other")
    model = dense_model()
    with pytest.raises(UserError, match=r"of another shape: cls_token"):
        adacomcat.save(model, tmp_path / "other", model_args={"depth": 2, "num_heads": 2})
    model = dense_model(**FAMILIES["vit_tiny_patch16_224"], norm_layer=nn.LayerNorm)
    with pytest.raises(UserError, match="norm_layer"):
        adacomcat.save(model, tmp_path / "other")
    assert not list(tmp_path.iterdir())


def test_explicit_description_serves_models_that_know_nothing(tmp_path):
    model = compressed()
    del model._model_args
    model.pretrained_cfg = {}
    with pytest.raises(UserError, match="architecture="):
        adacomcat.save(model, tmp_path / "folder")
    adacomcat.save(model, tmp_path / "folder", architecture="vit_tiny_patch16_224",
                   model_args=FAMILIES["vit_tiny_patch16_224"])
    assert_same(adacomcat.load(tmp_path / "folder"), model)


def test_timm_adapts_classes_size_and_features(tmp_path):
    model = compressed()
    adacomcat.save(model, tmp_path / "folder")
    source = f"local-dir:{tmp_path}/folder"
    x = images(model)
    with torch.inference_mode():
        features = model.forward_features(x)
        for classes in (3, 0):
            other = timm.create_model(source, pretrained=True, num_classes=classes).eval()
            torch.testing.assert_close(other.forward_features(x), features, rtol=0, atol=0)
            assert other(x).shape == (2, classes or 64)
        maps = timm.create_model(source, pretrained=True, features_only=True,
                                 out_indices=(0, 1)).eval()(x)
        expected = model.forward_intermediates(x, indices=(0, 1), intermediates_only=True)
        for found, wanted in zip(maps, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        larger = timm.create_model(source, pretrained=True, img_size=64).eval()
        assert larger(torch.randn(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("imports", ["import adacomcat, timm", "import timm, adacomcat"])
def test_any_import_order_serves_unmodified_timm(imports, tmp_path):
    adacomcat.save(compressed(), tmp_path / "folder")
    code = (f"{imports}\nmodel = timm.create_model('local-dir:{tmp_path}/folder', "
            "pretrained=True)\nprint(type(model.blocks[0].attn).__name__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "LowRankAttention", done.stderr


def test_every_flipped_bit_of_the_weights_is_found(tmp_path):
    adacomcat.save(compressed(), tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(300):
        at, bit = generator.randrange(len(whole)), 1 << generator.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
        with pytest.raises(UserError, match="checksum differs"):
            adacomcat.load(tmp_path / "small")


def test_weights_that_were_changed_on_purpose_load_unverified(tmp_path):
    adacomcat.save(compressed(), tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    weights = load_file(path)
    weights["norm.bias"] += 1
    save_file(weights, path)
    with pytest.raises(UserError, match="verify=False"):
        adacomcat.load(tmp_path / "small")
    loaded = adacomcat.load(tmp_path / "small", verify=False)
    assert torch.equal(loaded.norm.bias, weights["norm.bias"])


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        adacomcat.save(compressed(), tmp_path / "small")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "small").iterdir()}
    assert modes == {"config.json": 0o640, "model.safetensors": 0o640}


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path, monkeypatch):
    model = compressed()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in ("full", "file"):
        with pytest.raises(UserError, match="already holds something"):
            adacomcat.save(model, tmp_path / taken)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    adacomcat.save(model, tmp_path / "empty")
    adacomcat.load(tmp_path / "empty")

    def fails(*args, **kwargs):
        raise KeyboardInterrupt
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(folder, "save_file", fails)
    with pytest.raises(KeyboardInterrupt):
        adacomcat.save(model, tmp_path / "interrupted")
    assert sorted(tmp_path.iterdir()) == before


def test_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    """safetensors raises its own class there, which is no OSError."""
    def full(*args, **kwargs):
        raise SafetensorError('Error while serializing: I/O error: IoError(Os { code: 28, kind: '
                              'StorageFull, message: "No space left on device" })')
    model = compressed()
    monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises(UserError, match="cannot write .*StorageFull"):
        adacomcat.save(model, tmp_path / "small")
    assert not any(tmp_path.iterdir())
    assert cli.main(["compress", *MODEL, "--keep-params", "0.5", "-o", f"{tmp_path}/small"]) == 2
    assert "adacomcat: error: cannot write" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def edited_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN = {
    "no config.json": lambda f: (f / "config.json").unlink(),
    "config.json cannot be read": lambda f: truncated(f / "config.json"),
    "names no 'architecture'": lambda f: (f / "config.json").write_text('{"model_type": "vit"}'),
    "no weights file": lambda f: (f / "model.safetensors").unlink(),
    "its checksum differs": lambda f: truncated(f / "model.safetensors"),
    "did you mean vit_tiny": lambda f: edited_config(f, architecture="vit_tiny_patch16"),
    "names 'blocks.7.attn.qk'": lambda f: edited_config(f, model_args={
        "base": "vit_tiny_patch16_224", "plan": {"blocks.7.attn.qk": 4}, "depth": 2}),
    "describes no model that can be built": lambda f: edited_config(f, model_args={
        "base": "vit_tiny_patch16_224", "plan": {}, "width": 2}),
    "of another shape: cls_token": lambda f: edited_config(f, model_args={
        "base": "vit_tiny_patch16_224", "plan": {}, "depth": 2}),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_folders_get_one_clear_error(message, tmp_path):
    adacomcat.save(compressed(), tmp_path / "folder")
    BROKEN[message](tmp_path / "folder")
    with pytest.raises(UserError) as raised:
        adacomcat.load(tmp_path / "folder")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_and_unexpected_keys_are_named(tmp_path):
    adacomcat.save(compressed(), tmp_path / "folder")
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    weights["surplus"] = weights.pop("norm.weight")
    save_file(weights, tmp_path / "folder" / "model.safetensors")
    with pytest.raises(UserError, match="missing: norm.weight; unexpected: surplus"):
        adacomcat.load(tmp_path / "folder", verify=False)
    truncated(tmp_path / "folder" / "model.safetensors")
    with pytest.raises(UserError, match="truncated or no weights file"):
        adacomcat.load(tmp_path / "folder", verify=False)
    with pytest.raises(UserError, match="there is no checkpoint folder"):
        adacomcat.load(tmp_path / "absent")


def test_weights_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'sprung')!r}, 'w')",))
    torch.save({"model": {"a": torch.zeros(1), "b": Trap()}}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="holds an object of exec, which"):
        folder.read_weights(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()
