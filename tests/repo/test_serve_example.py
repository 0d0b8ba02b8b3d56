"""The web service of examples/serve answers as its model does, and its load is measured."""

import asyncio
import importlib.util
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import timm
import torch
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

import adacomcat

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve"


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


serve, load = imported("serve"), imported("load")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2,
                              num_heads=2, num_classes=7)
    where = tmp_path_factory.mktemp("serve") / "small"
    adacomcat.save(adacomcat.compress(model, keep_params=0.5), where)
    return where


@pytest.mark.parametrize("dense", [False, True])
def test_answers_are_the_models(folder: Path, dense: bool) -> None:
    model, content = adacomcat.load(folder), load.picture(side=40, seed=3)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(transform(Image.open(io.BytesIO(content))).unsqueeze(0)).softmax(1)[0]
    client = TestClient(serve.make_app(serve.load(str(folder), dense)))
    found = client.post("/classify", content=content).json()
    assert found["classes"] == expected.topk(5).indices.tolist()
    assert found["probabilities"] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-5)


def test_what_is_no_picture_is_refused(folder: Path) -> None:
    client = TestClient(serve.make_app(serve.load(str(folder))))
    assert client.post("/classify", content=b"no picture").status_code == 415


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(serve.make_app(serve.load(str(folder))), port=0,
                                           log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_load_is_measured_and_drawn(address: str, tmp_path: Path) -> None:
    curves = asyncio.run(load.measure({"one": address, "two": address}, load.picture(side=40),
                                      rates=(5, 20), seconds=0.5, limit=1e5))
    assert {name: list(curve) for name, curve in curves.items()} == {"one": [5, 20],
                                                                     "two": [5, 20]}
    assert all(0 < middle <= last for curve in curves.values() for middle, last in curve.values())
    load.draw(curves, tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text()


def test_no_higher_rate_is_asked_of_a_service_that_is_too_slow(address: str) -> None:
    curves = asyncio.run(load.measure({"one": address}, load.picture(side=40), rates=(5, 20),
                                      seconds=0.5, limit=0))
    assert list(curves["one"]) == [5]


def test_a_service_that_answers_with_an_error_is_no_measurement(address: str) -> None:
    with pytest.raises(httpx.HTTPStatusError):
        asyncio.run(load.measure({"one": address}, b"no picture", rates=(5,), seconds=0.1, limit=1))
