"""An optimized model holds its weights packed, and gives them back whenever it is asked."""

import copy
import gc
import io
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import adacomcat
from adacomcat.layers.packed import PackedModule
from adacomcat.ops import backends

pytestmark = pytest.mark.skipif(not backends.build_info(), reason="no C++ extension")
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["compressed", "dense"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=10).eval()
    for parameter in dense.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return dense if request.param == "dense" else adacomcat.compress(dense, keep_params=0.5)


def packed_modules(model: nn.Module) -> list[PackedModule]:
    return [m for m in model.modules() if isinstance(m, PackedModule) and m.forms]


@torch.inference_mode()
def outputs(model: nn.Module) -> torch.Tensor:
    return model(IMAGES)


def test_weights_are_held_once(model: nn.Module) -> None:
    fast = adacomcat.optimize(model)
    assert len(packed_modules(fast)) == 4  # the last attention and MLP multiply single tokens
    for module in packed_modules(fast):
        held = {name for name, p in module._parameters.items() if p is not None}
        assert not held & set(module.weights)
        assert set(module.packed) == set(module.weights) and not module.kept
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    mine = [*fast.parameters(), *fast.buffers()]
    assert not [p for p in mine if p.untyped_storage().data_ptr() in theirs]


def test_the_state_is_that_of_plain_weights(model: nn.Module) -> None:
    fast = adacomcat.optimize(model)
    plain = copy.deepcopy(fast)
    for module in packed_modules(plain):
        module.unpack_()
    assert not packed_modules(plain)
    state, expected = fast.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    torch.testing.assert_close(outputs(fast), outputs(plain), rtol=0, atol=0)
    for module in packed_modules(fast):
        for name in module.weights:
            assert getattr(module, name).dim() == 2


def test_a_state_is_loaded(model: nn.Module) -> None:
    fast = adacomcat.optimize(model)
    state = {name: t * 1.5 if t.dim() == 2 else t for name, t in fast.state_dict().items()}
    other = copy.deepcopy(fast)
    other.load_state_dict(state)
    assert len(packed_modules(other)) == 4
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    assert not torch.allclose(outputs(other), outputs(fast))


COPIES = {"copy.deepcopy": copy.deepcopy,
          "torch.save": lambda model: torch.load(
              io.BytesIO(saved(model)), weights_only=False)}


def saved(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_packed_too(model: nn.Module, copied: object) -> None:
    fast = adacomcat.optimize(model)
    other = copied(fast)
    assert len(packed_modules(other)) == 4
    assert torch.equal(outputs(other), outputs(fast))


def test_another_dtype(model: nn.Module) -> None:
    fast = adacomcat.optimize(model)
    expected = outputs(fast)
    half = copy.deepcopy(fast).to(torch.bfloat16)
    assert len(packed_modules(half)) == 4
    with torch.inference_mode():
        found = half(IMAGES.bfloat16())
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
        double = copy.deepcopy(fast).double()(IMAGES.double())
    torch.testing.assert_close(double.float(), expected, rtol=1e-4, atol=1e-4)


def test_an_assigned_weight_is_used(model: nn.Module) -> None:
    fast = adacomcat.optimize(model)
    module, expected = packed_modules(fast)[0], outputs(fast)
    name = next(iter(module.weights))
    weight = getattr(module, name)
    setattr(module, name, nn.Parameter(torch.zeros_like(weight), requires_grad=False))
    assert not torch.allclose(outputs(fast), expected)
    assert not getattr(module, name).any()


def test_what_no_kernel_computes(model: nn.Module) -> None:
    """Gradients of the input, autocast, and another backend, by formulas on the same weights."""
    fast = adacomcat.optimize(model)
    expected = outputs(fast)
    x = IMAGES.clone().requires_grad_()
    y = fast(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), expected, rtol=1e-4, atol=1e-4)
    assert x.grad is not None and x.grad.abs().sum() > 0
    with backends.use_backend("reference"):
        torch.testing.assert_close(outputs(fast), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(outputs(fast).float(), expected, rtol=0.1, atol=0.1)
    assert torch.equal(outputs(fast), expected)


def test_a_wrong_input_is_named_as_by_plain_weights(model: nn.Module) -> None:
    module = packed_modules(adacomcat.optimize(model))[0]
    plain = copy.deepcopy(module)
    plain.unpack_()
    x = torch.randn(1, 5, 191)

    def complaint(module: nn.Module) -> str:
        with pytest.raises(RuntimeError) as found:
            module(x)
        return str(found.value)

    assert complaint(module) == complaint(plain)


def test_export(model: nn.Module) -> None:
    fast = adacomcat.optimize(model)
    with torch.inference_mode():
        exported = torch.export.export(fast, (IMAGES,)).module()
        torch.testing.assert_close(exported(IMAGES), fast(IMAGES), rtol=1e-4, atol=1e-4)


def test_programs_hold_weights_in_floats(model: nn.Module) -> None:
    """No other runtime reads bytes as floats, and OpenVINO has no rule for aten::mT."""
    fast = adacomcat.optimize(model)
    with torch.no_grad():
        program = torch.export.export(fast, (IMAGES,))
        held = {**program.state_dict, **program.constants}.values()
        trace = torch.jit.trace(fast, IMAGES).inlined_graph
    assert torch.uint8 not in {tensor.dtype for tensor in held if isinstance(tensor, torch.Tensor)}
    operators = {str(node.target) for node in program.graph.nodes}
    assert not operators & {"aten.view.dtype", "aten.mT.default"}
    assert not [node for node in trace.nodes() if node.kind() == "aten::mT"]


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["onnx", "openvino"])
def test_exporters_take_optimized_models(exporter: str, model: nn.Module, tmp_path) -> None:
    runtime = pytest.importorskip("onnxruntime" if exporter == "onnx" else "openvino")
    fast = adacomcat.optimize(model)
    if exporter == "onnx":
        pytest.importorskip("onnxscript")
        torch.onnx.export(fast, (IMAGES,), str(tmp_path / "x.onnx"), dynamo=True, verbose=False)
        session = runtime.InferenceSession(tmp_path / "x.onnx")
        found = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})[0]
    else:
        converted = runtime.convert_model(fast, example_input=IMAGES)
        found = runtime.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(
            [IMAGES.numpy()])[0]
    torch.testing.assert_close(torch.from_numpy(found), outputs(fast), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimized", [False, True])
@torch.no_grad()
def test_blocks_of_many_ranks_are_one_graph(optimized: bool) -> None:
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48,
                              depth=12, num_heads=3, num_classes=5).eval()
    small = adacomcat.compress(dense, plan=adacomcat.RankPlan({
        f"blocks.{i}.{site}": i + 3 for i in range(12)
        for site in ("attn.qk", "attn.vo", "mlp.fc1", "mlp.fc2")}))
    fast, counter = adacomcat.optimize(small) if optimized else small, CompileCounter()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(fast, backend=counter)(x), fast(x))
    assert counter.frame_count == 1


@pytest.fixture
def one_process() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_optimized_model_says_why_not(model: nn.Module, one_process: DeviceMesh) -> None:
    for made in (copy.deepcopy(model), adacomcat.optimize(model)):
        expected = outputs(made)
        for part in (*made.blocks, made):
            fully_shard(part, mesh=one_process)
        if packed_modules(made):
            with pytest.raises(adacomcat.UserError, match="packed weights, which fully_shard"):
                made(IMAGES)
        else:
            torch.testing.assert_close(made(IMAGES), expected)


def test_threads_that_pack_and_run(model: nn.Module) -> None:
    """A model that is used by several threads while one of them reads its state."""
    fast = adacomcat.optimize(model)
    expected, wrong = outputs(fast), []

    def run() -> None:
        for _ in range(20):
            if not torch.equal(outputs(fast), expected):
                wrong.append(1)
            fast.state_dict()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


MEMORY = """
import gc, sys
import timm, torch, adacomcat

def anonymous():
    gc.collect()
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
x = torch.randn(1, 3, 224, 224)
small = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
with torch.inference_mode():
    adacomcat.optimize(small)(x)  # what the first call of everything takes
before = anonymous()
model = timm.create_model("vit_base_patch16_224", depth=6).eval()
weights = sum(p.numel() * 4 for p in model.parameters())
fast = adacomcat.optimize(model)
del model
with torch.inference_mode():
    fast(x)
print((anonymous() - before) / weights)
"""


def test_memory_of_an_optimized_model() -> None:
    """Packed, float32 has on AMX six bytes for each weight, elsewhere four; not eight."""
    found = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True,
                           check=True)
    amx = (backends.build_info() or {})["instruction_set"] == "amx"
    assert float(found.stdout) < (1.75 if amx else 1.25)


def test_the_model_that_went_in_is_left_alone(model: nn.Module) -> None:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    fast = adacomcat.optimize(model)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(1)
    gc.collect()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert trains == {name: p.requires_grad for name, p in model.named_parameters()}
