"""Files for other runtimes compute what the model computes; each format is tried where it is
installed."""

import json
from importlib.util import find_spec

import pytest
import timm
import torch
from helpers.models import FAMILIES, compressed, dense_model, images
from torch import nn

import adacomcat
from adacomcat import UserError, deploy
from adacomcat.deploy import FORMATS, formats
from adacomcat.utils.limits import EXPORT_DTYPES, EXPORT_FORMATS

MODELS = {
    "vit": ("vit_tiny_patch16_224", FAMILIES["vit_tiny_patch16_224"]),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 32, "embed_dim": 64, "depth": 2,
                                            "num_heads": 2, "num_classes": 7}),
    "swin": ("swin_tiny_patch4_window7_224", {**FAMILIES["swin_tiny_patch4_window7_224"],
                                              "depths": (2, 1)}),
}
RUNTIMES = [name for name, one in FORMATS.items() if not one.folder]
# Every model in every form is traced for torch's own format. The others begin with the same trace
# and take long: each has every model in one form or the other.
CELLS = [(format, name, optimized) for format in RUNTIMES for at, name in enumerate(MODELS)
         for optimized in (False, True)
         if format == "torch" or (format == "aoti" and name == "vit" and optimized)
         or (format != "aoti" and optimized == (at + RUNTIMES.index(format)) % 2)]


@pytest.fixture
def format(request: pytest.FixtureRequest) -> str:
    needs = (*FORMATS[request.param].packages, *FORMATS[request.param].runtime)
    missing = [package for package in needs if find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    return request.param


def model_of(name: str, optimized: bool = False) -> nn.Module:
    architecture, args = MODELS[name]
    model = compressed(architecture, **args)
    return adacomcat.optimize(model) if optimized else model


def target(folder, format: str):
    return folder / f"model{FORMATS[format].ending}"


@pytest.mark.slow
@pytest.mark.parametrize(("format", "name", "optimized"), CELLS, indirect=["format"])
def test_files_compute_the_same_for_every_batch(format, name, optimized, tmp_path):
    model = model_of(name, optimized)
    made = adacomcat.export(model, target(tmp_path, format), format=format, dynamic_batch=True)
    assert made.difference is not None and made.difference <= 1e-4
    run = FORMATS[format].run(made.path)
    with torch.no_grad():
        for count in (1, 2, 5):
            x = images(model, count)
            torch.testing.assert_close(run(x), model(x), rtol=0, atol=1e-4)
    assert made.size == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("format", [name for name in RUNTIMES if name != "aoti"], indirect=True)
def test_without_dynamic_batch_the_size_is_fixed(format, tmp_path):
    model = model_of("vit")
    made = adacomcat.export(model, target(tmp_path, format), format=format, batch_size=3)
    assert made.difference <= 1e-4
    run = FORMATS[format].run(made.path)
    with pytest.raises(Exception, match=r"(?s).*"):
        assert run(images(model, 5)).shape == (5, 7)


@pytest.mark.parametrize("format", ["onnx", "openvino"], indirect=True)
def test_half_precision_halves_the_file(format, tmp_path):
    model = model_of("vit")
    sizes = []
    for dtype in (torch.float32, torch.float16):
        made = adacomcat.export(model, tmp_path / f"{dtype}{FORMATS[format].ending}",
                                format=format, dtype=dtype)
        sizes.append(made.size)
        assert made.difference <= (1e-4 if dtype == torch.float32 else 2e-2)
    assert sizes[1] < 0.75 * sizes[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format", ["plain", "dense"])
def test_folders(format, name, tmp_path):
    model = compressed(name)
    made = adacomcat.export(model, tmp_path / "made", format=format)
    assert made.difference <= 1e-4
    assert made.size == sum(path.stat().st_size for path in made.path.iterdir())


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_folders_are_timms_own(name, tmp_path):
    model = compressed(name)
    adacomcat.export(model, tmp_path / "dense", format="dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["architecture"] == name
    dense = timm.create_model(f"local-dir:{tmp_path}/dense", pretrained=True).eval()
    kinds = {type(module).__module__.partition(".")[0] for module in dense.modules()}
    assert "adacomcat" not in kinds
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-4)


def test_pruned_mlps_become_dense_again(tmp_path):
    model = adacomcat.compress(dense_model(), keep_params=0.6,
                               calibration=torch.randn(32, 3, 32, 32))
    assert any(name.endswith(".hidden") for name in model.rank_plan.ranks)
    dense, x = adacomcat.to_dense(model), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in dense.parameters()) == sum(
        p.numel() for p in dense_model().parameters())


def test_a_bias_without_a_place_is_refused():
    model = dense_model("vit_tiny_patch16_224", **FAMILIES["vit_tiny_patch16_224"],
                        qkv_bias=False)
    small = adacomcat.compress(model, keep_params=0.6)
    adacomcat.to_dense(small)
    small.blocks[0].attn.bq.data += 1
    with pytest.raises(UserError, match="blocks.0.attn: its q has a bias now"):
        adacomcat.to_dense(small)


def test_what_computes_something_else_gets_no_name(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "torch", formats.Format(
        ".pt2", "", formats._write_program, lambda path: lambda x: torch.zeros(len(x), 7)))
    with pytest.raises(UserError, match="the exported file differs from the model by"):
        adacomcat.export(model_of("vit"), tmp_path / "x.pt2", format="torch")
    assert not list(tmp_path.iterdir())
    adacomcat.export(model_of("vit"), tmp_path / "x.pt2", format="torch", check=False)


def test_an_exporter_that_fails_is_named(tmp_path):
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = dense_model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * (2 if x.sum() > 0 else 3)

    with pytest.raises(UserError, match="format torch does not take this model: "):
        adacomcat.export(Mine(), tmp_path / "x.pt2", format="torch",
                         images=torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"format": "tflite"}, "there is no format 'tflite'; choose one of onnx"),
    ({"format": "torch", "opset": 18}, "an opset belongs to the format onnx"),
    ({"format": "torch", "dtype": torch.int8}, "is exported in float32, float16 or bfloat16"),
])
def test_wrong_arguments(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        adacomcat.export(model_of("vit"), tmp_path / "x", **arguments)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript: pip install 'adacom"):
        adacomcat.export(model_of("vit"), tmp_path / "x.onnx", format="onnx")
    with pytest.raises(UserError, match=r"pip install 'adacomcat\[executorch\]'"):
        adacomcat.export(model_of("vit"), tmp_path / "x.pte", format="executorch")


def test_models_that_return_no_tensor_are_refused(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = dense_model()

        def forward(self, x: torch.Tensor) -> tuple:
            return self.inner(x), x

    with pytest.raises(UserError, match="the model returns a tuple"):
        adacomcat.export(Two(), tmp_path / "x.pt2", format="torch",
                         images=torch.randn(1, 3, 32, 32))


def test_latency_stands_beside_ours(tmp_path):
    made = adacomcat.export(model_of("vit"), tmp_path / "x.pt2", format="torch", bench=True)
    assert set(made.latency_ms) == {"exported", "eager", "optimized"}
    assert all(milliseconds > 0 for milliseconds in made.latency_ms.values())


def test_names_of_flags_are_those_of_formats():
    assert tuple(FORMATS) == EXPORT_FORMATS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in EXPORT_DTYPES)
    assert deploy.export is adacomcat.export


def test_command(tmp_path, run_json, run):
    adacomcat.save(model_of("vit"), tmp_path / "small")
    made = run_json("export", tmp_path / "small", "--format", "torch", "--dynamic-batch")
    assert made["output"] == str(tmp_path / "small.pt2") and made["difference"] <= 1e-4
    assert (tmp_path / "small.pt2").stat().st_size == made["bytes"]
    code, _, err = run("export", "-m", tmp_path / "small", "--format", "dense", "--optimize")
    assert code == 2 and "to_dense takes the model" in err
    code, out, err = run("export", "-m", tmp_path / "small", "--format", "plain", "--bench",
                         "-o", tmp_path / "p")
    assert code == 0, err
    assert "largest difference" in out and "optimized: " in out
    code, _, err = run("export", "-m", tmp_path / "small")
    assert code == 2 and "export needs --format" in err
