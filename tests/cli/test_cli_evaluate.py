"""adacomcat evaluate without a head, beside the dense model, and on pictures without labels."""

import json

import pytest
import torch
from helpers.command_line import GRAY
from helpers.models import dense_model
from helpers.pictures import write_pictures
from helpers.together import command_on
from sklearn.neighbors import KNeighborsClassifier

import adacomcat
from adacomcat.data import datasets


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(dense backbone without a head, the same compressed)"""
    folder = tmp_path_factory.mktemp("backbone")
    model = dense_model("vit_small_patch14_dinov2", img_size=28, embed_dim=64, depth=2,
                        num_heads=2, num_classes=0)
    adacomcat.save(model, folder / "dense")
    adacomcat.save(adacomcat.compress(model, keep_params=0.6), folder / "small")
    return folder / "dense", folder / "small"


def test_a_backbone_without_a_head_has_an_accuracy(folders, run_json, tmp_path):
    dense, small = folders
    found = run_json("evaluate", "-m", small, "--data", "digits", "--knn", "--linear-probe",
                     "--train-images", 200, "--test-images", 60, "--teacher", dense,
                     "--record", tmp_path)
    assert set(found["methods"]) == {"knn", "linear_probe"}
    assert (found["images"], found["train_images"]) == (60, 200)
    assert found["top1"] == found["methods"]["knn"]["top1"] > 15, "chance is 10"
    model = adacomcat.load(small)
    config = datasets.model_data_config(model)
    del config["num_classes"]
    parts = []
    for part, count in zip(datasets.train_and_test("digits", None, config), (200, 60),
                           strict=True):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count]
        pictures, labels = part.batch(order)
        with torch.inference_mode():
            parts.append((model.forward_features(pictures)[:, 0].double().numpy(), labels))
    knn = KNeighborsClassifier(20, metric="cosine", algorithm="brute",
                               weights=lambda d: torch.from_numpy((1 - d) / 0.07).exp().numpy())
    knn.fit(*parts[0])
    right = torch.from_numpy(knn.predict(parts[1][0])) == parts[1][1]
    assert found["methods"]["knn"]["top1"] == pytest.approx(100 * right.double().mean().item(),
                                                            abs=2)
    changed = found["flips"]["knn"]
    assert changed["top1_difference"] == pytest.approx(
        found["methods"]["knn"]["top1"] - found["dense"]["methods"]["knn"]["top1"])
    assert changed["flips"] >= changed["lost"] + changed["won"] > 0
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written.pop("command").startswith("adacomcat evaluate -m ")
    assert written == {"format": 1} | found


def test_pictures_without_labels_compare(folders, run, run_json, tmp_path):
    dense, small = folders
    write_pictures(tmp_path / "photos", 8, seed=1)
    argv = ["evaluate", "--images", tmp_path / "photos", "--teacher", dense, "-m"]
    assert run_json(*argv, dense)["agreement"]["token_error"] == 0
    found = run_json(*argv, small)["agreement"]
    assert 0 < found["token_error"] < 1.5 and found["images"] == 8
    code, out, _ = run(*argv, small)
    assert code == 0 and f"{found['token_error']:.4f}" in out and "shared nearest" in out


def test_a_classifier_has_top5_classes_and_flips(tmp_path, run, run_json):
    run_json("train", *GRAY, "--data", "digits", "--dense", "--epochs", 1, "-o", tmp_path / "d",
             "--no-report")
    run_json("compress", "-m", tmp_path / "d", "--keep-params", 0.6, "-o", tmp_path / "s",
             "--no-report")
    argv = ["evaluate", "-m", tmp_path / "s", "--data", "digits", "--teacher", tmp_path / "d"]
    found = run_json(*argv)
    head = found["methods"]["head"]
    assert head["top1_interval"][0] <= found["top1"] <= head["top1_interval"][1]
    assert found["top1"] < found["top5"] and len(head["per_class"]) == 10
    code, out, _ = run(*argv)
    assert code == 0 and "of the predictions changed" in out and "95% interval" in out


def test_two_processes_classify_as_one(folders, run_json):
    flags = ["evaluate", "-m", folders[1], "--data", "digits", "--knn", "--train-images", "150",
             "--test-images", "61", "-b", "32"]
    alone = run_json(*flags)
    done = command_on(2, *flags, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    for name in ("top1", "top5", "images"):
        assert together[name] == pytest.approx(alone[name]), name


BAD = {
    "evaluate needs one of --data and --images FOLDER": [],
    "have no labels": ["--images", "p", "--knn"],
    "name it with --teacher": ["--images", "p"],
    "has no classifier: pass --knn or --linear-probe": ["--data", "digits"],
    "all of one class": ["--data", "digits", "--knn", "--train-images", "1"],
}


@pytest.mark.parametrize("says", BAD)
def test_wrong_use_is_one_line(says, folders, run):
    code, out, err = run("evaluate", "-m", folders[1], *BAD[says])
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err
