"""Weights of other people's training scripts: where they put them, and what else is in the file."""

import argparse
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from helpers.models import FAMILIES, dense_model
from torch import nn

from adacomcat import checkpoint
from adacomcat.checkpoint import weights as weights_module
from adacomcat.errors import UserError

VIT = "vit_tiny_patch16_224"
ARGS = FAMILIES[VIT]


def other_model(**changes):
    return dense_model(VIT, seed=1, **ARGS | changes)


def loaded(path, source="it", **changes):
    model = other_model(**changes)
    checkpoint.load_foreign_(model, checkpoint.read_weights(path), source)
    return model


def images(side=32, channels=3):
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(3))


def test_a_pickle_that_runs_code_does_not_run_it(tmp_path):
    """Beside the weights, and in the arguments: no object but the arguments' class is made."""
    class Runs:
        def __reduce__(self):
            return (partial(Path.touch), (tmp_path / "ran",))

    class Writes:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for trap in (Runs(), Writes()):
        pickle.loads(pickle.dumps(trap))
        assert (tmp_path / "ran").exists()  # the trap works
        (tmp_path / "ran").unlink()
        for place in ({"rng": trap}, {"args": argparse.Namespace(transform=trap)}):
            torch.save({"model": dense_model().state_dict()} | place, tmp_path / "a.pth")
            with pytest.raises(UserError, match="holds an object of"):
                checkpoint.read_weights(tmp_path / "a.pth")
            assert not (tmp_path / "ran").exists()


def test_dino_keeps_teacher_and_student(tmp_path):
    """Its teacher is a backbone beside a projection that no classifier is."""
    student, teacher = dense_model(seed=5), dense_model(seed=6)

    def wrapped(model, prefix):
        inner = nn.ModuleDict({"backbone": model, "head": nn.Linear(64, 32)}).state_dict()
        return {f"{prefix}{name}": tensor for name, tensor in inner.items()
                if not name.startswith("backbone.head.")}

    torch.save({"student": wrapped(student, "module."), "teacher": wrapped(teacher, ""),
                "optimizer": {}, "epoch": 4, "args": argparse.Namespace(arch="vit_tiny"),
                "dino_loss": {"center": torch.zeros(1, 32)}}, tmp_path / "dino.pth")
    with pytest.warns(UserWarning, match="no classifier, and the model has one; that one starts"):
        model = loaded(tmp_path / "dino.pth")
    expected = teacher.forward_features(images())
    torch.testing.assert_close(model.forward_features(images()), expected)


@pytest.mark.parametrize(("theirs", "own", "says"), [
    (11, 7, "a classifier of 11 classes, and the model one of 7; that one starts at random"),
    (0, 7, "no classifier, and the model has one"),
    (7, 0, "a classifier, and the model has none; it is left out")])
def test_classifiers_of_other_classes(theirs, own, says, tmp_path):
    source = dense_model(VIT, **ARGS | {"num_classes": theirs})
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    before = other_model(num_classes=own).head
    with pytest.warns(UserWarning, match=says):
        model = loaded(tmp_path / "a.pth", num_classes=own)
    torch.testing.assert_close(model.forward_features(images()),
                               source.forward_features(images()))
    if own:
        assert torch.equal(model.head.weight, before.weight)


def test_a_classifier_that_is_needed_is_asked_for(tmp_path):
    torch.save(dense_model(VIT, **ARGS | {"num_classes": 11}).state_dict(), tmp_path / "a.pth")
    weights = checkpoint.read_weights(tmp_path / "a.pth")
    with pytest.raises(UserError, match="classifier of 11 classes, .*pass --num-classes"):
        checkpoint.load_foreign_(other_model(), weights, "it", keep_head=True)
    checkpoint.load_foreign_(other_model(num_classes=11), weights, "it", keep_head=True)


def test_positions_of_another_resolution_are_interpolated(tmp_path):
    """As timm does where it resizes a model that is built already."""
    source = dense_model()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.pth")
    model = loaded(tmp_path / "a.pth", img_size=64)
    source.set_input_size(img_size=64)
    torch.testing.assert_close(model(images(64)), source(images(64)))


def test_other_models_are_refused(tmp_path):
    torch.save(dense_model(VIT, **ARGS | {"depth": 3}).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="does not fit the model; unexpected: blocks.2"):
        loaded(tmp_path / "a.pth")
    torch.save(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "b.pth")
    with pytest.raises(UserError, match="does not fit the model"):
        loaded(tmp_path / "b.pth")


@pytest.fixture
def served(tmp_path):
    """A folder, and the address under which a server of this machine shows it."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_addresses_are_downloaded_once(served, tmp_path, monkeypatch):
    folder, address = served
    torch.save({"model": dense_model().state_dict()}, folder / "vit.pth")
    torch.save({"model": dense_model().state_dict()}, folder / "vit-0123456789.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights_module, "SECURE", address)
    found = checkpoint.read_weights(f"{address}/vit.pth")
    assert found.keys() == dense_model().state_dict().keys()
    (folder / "vit.pth").unlink()
    assert checkpoint.read_weights(f"{address}/vit.pth").keys() == found.keys()
    with pytest.raises(UserError, match=r"cannot download .*other\.pth: .*404"):
        checkpoint.read_weights(f"{address}/other.pth")
    with pytest.raises(UserError, match="cannot download .*invalid hash"):
        checkpoint.read_weights(f"{address}/vit-0123456789.pth")
