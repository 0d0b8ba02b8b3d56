"""Files of weights and checkpoint folders: a model that runs and can be saved, or one line."""

import io
import json
import pickle
import shutil

import pytest
import torch
from helpers.comcat import imported, released
from helpers.fuzzing import JSON, accepted, altered, damaged, fuzzed
from helpers.models import dense_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as serialized
from safetensors.torch import save_file

import adacomcat
from adacomcat import checkpoint
from adacomcat.checkpoint.gauge import with_gauge
from adacomcat.utils.model import input_size

TINY = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 1,
        "num_heads": 2, "num_classes": 3}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool,
          torch.complex64)
SHAPES = st.one_of(st.sampled_from(((), (0,), (0, 10**5), (10**5, 0), (1, 10**4), (3, 0))),
                   st.lists(st.integers(0, 5), max_size=4).map(tuple))


def tiny():
    return dense_model(**TINY)


@st.composite
def tensors(draw):
    tensor = torch.zeros(draw(SHAPES), dtype=draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(("plain", "plain", "plain", "sparse", "expanded", "meta", "view")))
    if kind == "sparse" and tensor.ndim:
        return tensor.to_sparse()
    if kind == "expanded" and tensor.ndim:
        return tensor[:1].expand(10**6, *tensor.shape[1:]) if len(tensor) else tensor
    if kind == "meta":
        return tensor.to("meta")
    return tensor.mT if kind == "view" and tensor.ndim > 1 else tensor


NAMES = st.one_of(st.sampled_from(sorted(tiny().state_dict())), st.text(max_size=10))


@st.composite
def state_dicts(draw):
    """The weights of a tiny model with a few other entries."""
    weights = dict(tiny().state_dict())
    for _ in range(draw(st.integers(0, 2))):
        weights.pop(draw(st.sampled_from(sorted(weights, key=str))))
    keys = st.one_of(NAMES, NAMES, st.integers(), st.binary(max_size=3), st.none())
    return weights | draw(st.dictionaries(keys, st.one_of(tensors(), tensors(), JSON), max_size=3))


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def require_model(path):
    """What is read fits a model by its names and shapes, or is refused; then the model runs."""
    weights = accepted(lambda: checkpoint.read_weights(path))
    if weights is None:
        return
    model = tiny()
    fits = accepted(lambda: checkpoint.load_weights_(model, weights, "x") or True)
    if fits:
        model(torch.zeros(1, *input_size(model)))


@fuzzed(1.5)
@given(state=state_dicts(), wrapped=st.sampled_from((None, "model", "state_dict", "x", 3)))
def test_pickles_of_other_things(state, wrapped, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.pth"
    path.write_bytes(pickled(state if wrapped is None else {wrapped: state}))
    require_model(path)


@fuzzed()
@given(content=st.one_of(damaged(pickled(tiny().state_dict())), st.binary(max_size=60),
                         JSON.map(pickle.dumps), damaged(pickle.dumps({"a": [1, (2, "x")]}))))
def test_damaged_pickles(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(content)
    require_model(path)


@fuzzed()
@given(content=st.one_of(damaged(serialized(tiny().state_dict())), st.binary(max_size=60)))
def test_damaged_safetensors(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    require_model(path)


@fuzzed(2)
@given(rest=tensors(), pivots=tensors(), other=st.integers(0, 2**31))
def test_gauges(rest, pivots, other):
    if 0 < pivots.numel() < 10**6 and not pivots.is_complex() and pivots.dtype != torch.bool \
            and pivots.layout == torch.strided and not pivots.is_meta:
        pivots = torch.arange(pivots.numel()).reshape(pivots.shape).to(pivots.dtype) * (other % 3)
    if rest.layout != torch.strided or pivots.layout != torch.strided \
            or rest.is_meta or pivots.is_meta:  # files of safetensors have none of these
        return
    found = accepted(lambda: with_gauge({"v_rest": rest, "v_pivots": pivots}))
    assert found is None or found["v"].numel() >= rest.numel()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """config.json and weights of a dense model and of a compressed one."""
    place, model = tmp_path_factory.mktemp("folders"), tiny()
    adacomcat.save(model, place / "dense")
    plan = adacomcat.RankPlan.uniform(model, 0.7, multiple=2)
    adacomcat.save(adacomcat.compress(model, plan=plan), place / "small", gauge=True)
    return place


INTERESTING = {"depth": [0, 2, -1, 10**4, 10**9], "num_heads": [0, -1, 3, 16], "img_size": [
    17, [16, 4000], 10**4, -16], "patch_size": [0, 17, 1, [8, 8], 1.5], "embed_dim": [0, 17, 10**6],
    "num_classes": [0, 4, -1, None], "in_chans": [0, 3, 10**5], "mlp_ratio": [0, -1, 1e9],
    "norm_layer": ["x", 3], "class_token": [False], "checkpoint_path": ["x"], "base": ["x", 3],
    "pretrained": [True], "init_values": [1e-5, "x"], "drop_rate": [2, -1], "dynamic_img_size": [1],
    "plan": [{}, {"x": 1}, {"blocks.0.attn.qk": 10**9}], "weight_init": ["x"],
    "pos_embed": ["none"]}


@fuzzed(2)
@given(data=st.data(), which=st.sampled_from(("dense", "small")))
def test_configurations(data, which, folders, tmp_path_factory):
    config = json.loads((folders / which / "config.json").read_text(encoding="utf-8"))
    if data.draw(st.booleans()):
        config = data.draw(altered(config))
    else:
        names = st.lists(st.sampled_from(sorted(INTERESTING)), min_size=1, max_size=2)
        for name in data.draw(names):
            config["model_args"][name] = data.draw(st.sampled_from(INTERESTING[name]))
    place = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folders / which, place)
    text = json.dumps(config)
    if data.draw(st.integers(0, 4)) == 0:
        text = data.draw(damaged(text.encode())).decode("latin-1")
    (place / "config.json").write_text(text, encoding="utf-8")
    model = accepted(lambda: adacomcat.load(place))
    if model is None:
        return
    model(torch.zeros(1, *input_size(model)))
    adacomcat.data.model_data_config(model)
    again = tmp_path_factory.getbasetemp() / "again"
    shutil.rmtree(again, ignore_errors=True)
    accepted(lambda: adacomcat.save(model, again) or True)


@fuzzed()
@given(data=st.data())
def test_checkpoints_of_comcat(data, tmp_path_factory):
    place = tmp_path_factory.getbasetemp() / "comcat"
    place.mkdir(exist_ok=True)
    weights = dict(released(place).state_dict())
    changes = st.dictionaries(st.sampled_from(sorted(weights)), st.one_of(tensors(), JSON),
                              max_size=3)
    torch.save({"model": weights | data.draw(changes)}, place / "checkpoint.pth")
    model = accepted(lambda: imported(place))
    if model is not None:
        model(torch.zeros(1, *input_size(model)))


def test_files_of_no_use_are_refused_and_those_of_use_are_not(tmp_path):
    save_file(tiny().state_dict(), tmp_path / "a.safetensors")
    require_model(tmp_path / "a.safetensors")
    assert accepted(lambda: checkpoint.read_weights(tmp_path / "a.safetensors")) is not None
    assert accepted(lambda: checkpoint.read_weights(tmp_path / "b")) is None
