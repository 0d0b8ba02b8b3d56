"""Files that others wrote, or damaged: one line that says what the file is, and no large work."""

import argparse
import contextlib
import json
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from helpers import comcat
from helpers.models import compressed, dense_model
from safetensors.torch import load_file, save_file
from torch import nn

import adacomcat
from adacomcat import checkpoint
from adacomcat.checkpoint import build
from adacomcat.checkpoint.gauge import with_gauge
from adacomcat.errors import UserError


class Stranger:
    """A class that no reader of weights may make."""


# Files of weights


@pytest.mark.parametrize("extra", [{}, {"args": argparse.Namespace(lr=0.1, model="x"), "epoch": 3}])
@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", None])
def test_checkpoints_of_training_scripts_are_read(key, extra, tmp_path):
    """timm's train.py and DeiT's main.py write their arguments beside the weights."""
    weights = dense_model().state_dict()
    if key is None and extra:
        return
    torch.save(weights if key is None else {key: weights} | extra, tmp_path / "best.pth.tar")
    found = checkpoint.read_weights(tmp_path / "best.pth.tar")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


CONTENTS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"\n<!DOCTYPE html>\n<html><body>404</body></html>",
    "JSON": b'{"weight_map": {"a": "model-1.safetensors"}}',
    "compressed": b"\x1f\x8b\x08\x00abc", "empty": b"",
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("what", CONTENTS)
def test_what_the_file_is(what, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(CONTENTS[what])
    with pytest.raises(UserError, match=f"holds no weights: it is {what}"):
        checkpoint.read_weights(path)


def test_the_content_counts_and_not_the_name(tmp_path):
    weights = {"a": torch.arange(3.0)}
    save_file(weights, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        assert torch.equal(checkpoint.read_weights(tmp_path / name)["a"], weights["a"])


@pytest.mark.parametrize("content", [b"\x80\x02](((((((.", b"\x80\x04.", b"PK\x03\x04", b"\0" * 100,
                                     b"\x80\x02cos\nsystem\n.", pickle.dumps({"a": [1]}), b"c"])
def test_damaged_pickles(content, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pth (is truncated|holds)") as raised:
        checkpoint.read_weights(tmp_path / "a.pth")
    assert "\n" not in str(raised.value) and "weights_only` set to `False" not in str(raised.value)


def test_the_class_in_the_way_is_named(tmp_path):
    torch.save({"model": dense_model().state_dict(), "rng": Stranger()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"holds an object of \S*Stranger"):
        checkpoint.read_weights(tmp_path / "a.pth")


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth") as stored, \
            zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    with pytest.raises(UserError, match="parts are larger than the file"):
        checkpoint.read_weights(tmp_path / "packed.pth")


@pytest.mark.parametrize(("entries", "says"), [
    ({1: torch.zeros(2)}, "1 is no name"), ({b"k": torch.zeros(2)}, "is no name"),
    ({"x": [1]}, "x is a list"), ({"x": None}, "x is a NoneType"),
    ({"a\n\u2028b": None}, r"a\\n\\u2028b is a NoneType"),
    ({"x": torch.zeros(4, 4).to_sparse()}, "x is no plain tensor"),
    ({"x": torch.zeros(1).expand(10**6)}, "x is no plain tensor"),
    ({"x": torch.zeros(3, device="meta")}, "x is no plain tensor"),
    ({"x": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)}, "x is no plain")])
def test_entries_that_are_no_plain_tensors(entries, says, tmp_path):
    torch.save(OrderedDict({"head.bias": torch.zeros(2)} | entries), tmp_path / "a.pth")
    with pytest.raises(UserError, match=says):
        checkpoint.read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_numbers_of_another_kind_are_not_copied(dtype):
    model = dense_model()
    weights = model.state_dict()
    other = weights | {"head.bias": weights["head.bias"].to(dtype)}
    with pytest.raises(UserError, match="kind: head.bias (int8|whole|complex) instead of real"):
        checkpoint.load_weights_(model, other, "x")
    checkpoint.load_weights_(model, {k: v.bfloat16() for k, v in weights.items()}, "x")


# Folders


@pytest.fixture
def folder(tmp_path):
    """A saved model whose config.json and weights a test may change."""
    adacomcat.save(compressed(), tmp_path / "folder")

    def change(model_args=None, pretrained_cfg=None, weights=None, **top):
        path = tmp_path / "folder" / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model_args"] |= model_args or {}
        config["pretrained_cfg"] |= pretrained_cfg or {}
        path.write_text(json.dumps(config | top), encoding="utf-8")
        if weights:
            file = tmp_path / "folder" / "model.safetensors"
            save_file(load_file(file) | weights, file, metadata={"format": "pt"})
        return tmp_path / "folder"
    return change


@contextlib.contextmanager
def little_memory_taken(monkeypatch):
    """Inside, no tensor with numbers of more than a million may be made."""
    made = torch.Tensor.new_zeros

    def zeros(self, *size, **options):
        found = made(self, *size, **options)
        assert found.numel() < 10**6
        return found
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", zeros)
        yield


@pytest.mark.parametrize(("changes", "says"), [
    ({"pretrained_cfg": {"mean": "x"}}, "mean must be a list of numbers"),
    ({"pretrained_cfg": {"mean": [0.5, "a"]}}, "mean must be"),
    ({"pretrained_cfg": {"std": [0.0]}}, "std must be a list of numbers above 0"),
    ({"pretrained_cfg": {"input_size": [3, 1 << 20, 1 << 20]}}, "input_size must be"),
    ({"pretrained_cfg": {"interpolation": "x"}}, "interpolation must be"),
    ({"pretrained_cfg": {"crop_pct": 0}}, "crop_pct must be"),
    ({"num_classes": "7"}, "num_classes must be"), ({"num_classes": -1}, "num_classes must be"),
    ({"model_args": {"base": 8}}, "base must be a word"),
    ({"model_args": {"plan": {"blocks.0.attn.qk": True}}}, "plan must be an object of ranks"),
    ({"model_args": {"plan": ["a"]}}, "plan must be"),
    ({"model_args": {"checkpoint_path": "../other.pth"}}, "model_args has checkpoint_path"),
    ({"model_args": {"pretrained": True}}, "model_args has pretrained"),
    ({"model_args": {"cache_dir": "/"}}, "model_args has cache_dir"),
    ({"model_args": {"base": "local-dir:/elsewhere"}}, "timm has no model"),
    ({"model_args": {"depth": 10**9}}, "depth 1000000000 makes more than 10,000 modules"),
    ({"model_args": {"embed_dim": 10**9}}, "embed_dim 1000000000 is more than its weights have"),
    ({"model_args": {"depth": 20_000}}, "more than .* modules"),
    ({"model_args": {"base": None}}, "timm has no model None"),
    ({"model_args": {"img_size": [12_000, 12_000]}}, "of another shape: pos_embed"),
    ({"model_args": {"num_heads": 0}}, "describes no model"),
    ({"model_args": {"num_heads": -1}}, "describes no model"),
    ({"model_args": {"patch_size": 0}}, "describes no model"),
    ({"model_args": {"norm_layer": "x"}}, "describes no model"),
    ({"architecture": 3}, "names no 'architecture'"), ({"architecture": "x" * 400}, "timm has no")])
def test_descriptions_that_are_refused(changes, says, folder):
    with pytest.raises(UserError, match=says) as raised:
        adacomcat.load(folder(**changes))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


NAMED = '{"architecture": "vit_tiny_patch16_224", '


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "3", '"a"', "null", "{", "\xff", "",
                                  NAMED + '"pretrained_cfg": 1}', NAMED + '"pretrained_cfg": [1]}',
                                  NAMED + '"model_args": {"a": NaN}}'])
def test_config_json_of_another_form(text, folder):
    place = folder()
    (place / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json"):
        adacomcat.load(place)


def test_what_save_writes_is_a_description_that_load_takes(tmp_path):
    """An argument of timm that is none of the model's is left out."""
    model = dense_model()
    model._model_args = model._model_args | {"pretrained_strict": False}
    adacomcat.save(model, tmp_path / "folder")
    adacomcat.load(tmp_path / "folder")


def test_a_diverged_model_is_written_all_the_same(tmp_path):
    model = dense_model()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    adacomcat.save(model, tmp_path / "folder")
    assert adacomcat.load(tmp_path / "folder").norm.weight.isnan().all()


# Gauges


@pytest.mark.parametrize(("rest", "pivots"), [
    (torch.zeros(3, 2), torch.zeros((), dtype=torch.int32)),
    (torch.zeros(3), torch.zeros(2, dtype=torch.int32)),
    (torch.zeros(3, 0), torch.zeros(0, dtype=torch.int32)),
    (torch.zeros(()), torch.zeros(2, dtype=torch.int32)),
    (torch.zeros(3, 2), torch.zeros(2, dtype=torch.complex64)),
    (torch.zeros(3, 2), torch.zeros(2)), (torch.zeros(3, 2), torch.ones(2, dtype=torch.bool)),
    (torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 2, dtype=torch.int32)),
    (torch.zeros(3, 2), torch.tensor([-1, 0])), (torch.zeros(2, 3, 2), torch.tensor([0, 1]))])
def test_gauges_of_other_ranks(rest, pivots):
    with pytest.raises(UserError, match="do not belong together"):
        with_gauge({"x.v_rest": rest, "x.v_pivots": pivots})


def test_a_gauge_restores_no_more_than_its_file_can_have_left_out(folder, monkeypatch):
    place = folder(weights={"x.v_rest": torch.zeros(0, 100_000),
                            "x.v_pivots": torch.arange(100_000, dtype=torch.int32)})
    with little_memory_taken(monkeypatch), pytest.raises(UserError, match="more than the file has"):
        adacomcat.load(place, verify=False)


# ComCAT's files


FACTOR = "head.selected_rank_layer."
CHANGES = {
    "is no name": lambda w: w.update({1: torch.zeros(2)}),
    f"{FACTOR}last_factor.bias has the shape \\(0,\\)":
        lambda w: w.update({f"{FACTOR}last_factor.bias": torch.zeros(0)}),
    f"{FACTOR}last_factor.weight has the shape \\(\\)":
        lambda w: w.update({f"{FACTOR}last_factor.weight": torch.zeros(())}),
    f"{FACTOR}first_factor.weight is a list":
        lambda w: w.update({f"{FACTOR}first_factor.weight": [1]}),
    "w_vs.bias has the shape \\(\\)":
        lambda w: w.update({"blocks.0.attn.selected_rank_layer.w_vs.bias": torch.zeros(())}),
    "both are the rank": lambda w: w.update({f"{FACTOR}first_factor.weight": torch.zeros(3, 48),
                                             f"{FACTOR}first_factor.bias": torch.zeros(3)}),
    "pos_embed is no plain tensor": lambda w: w.update({"pos_embed": w["pos_embed"].to_sparse()}),
}


@pytest.mark.parametrize("says", CHANGES)
def test_damaged_checkpoints_of_comcat(says, tmp_path):
    weights = dict(comcat.released(tmp_path).state_dict())
    CHANGES[says](weights)
    torch.save({"model": weights}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=says):
        comcat.imported(tmp_path)


@pytest.mark.parametrize("text", ["9" * 5000 + ",8" * 8, "\u0663" + ",8" * 8, "-1" + ",8" * 8])
def test_ranks_that_are_no_ranks(text, tmp_path):
    comcat.released(tmp_path)
    (tmp_path / "ranks.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="is no rank"):
        comcat.imported(tmp_path)


def test_the_bound_on_parts_is_for_each_construction() -> None:
    """The outline counted, too, so a model of half as many parts was refused."""
    make = build._bounded(lambda: nn.Sequential(*(nn.Linear(1, 1) for _ in range(20))), most=70)
    assert len(make()) == len(make()) == 20
    with pytest.raises(ValueError, match="more than 50 modules and parameters"):
        build._bounded(make, most=50)()
