"""Other runtimes for the dense model and for the same low ranks in PyTorch's own modules.

A peer is a callable on a batch (B, 3, H, W) in CPU memory. A function here that makes one raises an
error where the runtime is not installed or does not take the dtype.
"""

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import LowRankMlp

Peer = Callable[[Tensor], object]


class PlainLinear(nn.Module):
    """The factors as two ``nn.Linear``, each with its weight (out, in)."""

    def __init__(self, low_rank: LowRankLinear) -> None:
        super().__init__()
        self.down = nn.Linear(low_rank.in_features, low_rank.rank, bias=False)
        self.up = nn.Linear(low_rank.rank, low_rank.out_features)
        with torch.no_grad():
            self.down.weight.copy_(low_rank.v.T)
            self.up.weight.copy_(low_rank.u)
            assert low_rank.bias is not None
            self.up.bias.copy_(low_rank.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class PlainMlp(nn.Module):
    """An MLP of two ``PlainLinear``."""

    def __init__(self, mlp: LowRankMlp) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = PlainLinear(mlp.fc1), mlp.act, PlainLinear(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PlainAttention(nn.Module):
    """One ``nn.Linear`` for q, k and v, PyTorch's fused attention, one ``nn.Linear`` after it."""

    def __init__(self, attn: LowRankAttention) -> None:
        super().__init__()
        self.num_heads, self.scale = attn.num_heads, attn.scale
        self.sizes = [attn.wq.shape[0], attn.wk.shape[0], attn.wv.shape[0]]
        self.qkv = nn.Linear(attn.wq.shape[1], sum(self.sizes))
        self.proj = nn.Linear(attn.wo.shape[1], attn.wo.shape[0])
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([attn.wq, attn.wk, attn.wv]))
            self.qkv.bias.copy_(torch.cat([attn.bq, torch.zeros(sum(self.sizes[1:]))]))
            self.proj.weight.copy_(attn.wo)
            self.proj.bias.copy_(attn.bo)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for t in self.qkv(x).split(self.sizes, -1))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


def plain(model: nn.Module) -> nn.Module:
    """Put the factors into PyTorch's own modules, in place: for exporters, and as a baseline."""
    kinds: dict[type, Callable[[Any], nn.Module]] = {
        LowRankAttention: PlainAttention, LowRankMlp: PlainMlp, LowRankLinear: PlainLinear}
    for name, module in list(model.named_modules()):
        inside_mlp = type(module) is LowRankLinear and name.rpartition(".")[0].endswith("mlp")
        if type(module) in kinds and not inside_mlp:
            model.set_submodule(name, kinds[type(module)](module))
    return model.eval()


def eager(model: nn.Module, dtype: torch.dtype) -> Peer:
    """The model as PyTorch runs it."""
    model = model.to(dtype)
    return lambda x: model(x.to(dtype))


def compiled(model: nn.Module, dtype: torch.dtype, example: Tensor) -> Peer:
    """torch.compile with frozen weights, already compiled for the example's shape."""
    inductor.freezing = True
    torch.compiler.reset()
    floats = torch.float32 if dtype == torch.int8 else dtype
    if dtype == torch.int8:
        quantize_by_torchao(model)
    compiled_model = torch.compile(model.to(floats))

    def run(x: Tensor) -> object:
        return compiled_model(x.to(floats))

    run(example)
    return run


def quantize_by_torchao(model: nn.Module) -> None:
    """int8 weights by channel and activations by token, in place."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def onnxruntime(model: nn.Module, dtype: torch.dtype, example: Tensor, threads: int) -> Peer:
    """ONNX Runtime on the CPU, for the example's shape."""
    import onnxruntime as ort

    if dtype == torch.bfloat16:
        raise NotImplementedError("its CPU kernels for this model are float32 and int8")
    buffer = io.BytesIO()
    program: Any = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    program.save(buffer)
    content = buffer.getvalue()
    if dtype == torch.int8:
        content = quantized_onnx(content)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(content, options,
                                   providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def quantized_onnx(content: bytes) -> bytes:
    """The model with int8 weights, and activations that are rounded as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.onnx", Path(folder) / "made.onnx"
        given.write_bytes(content)
        quantize_dynamic(given, made, weight_type=QuantType.QInt8, per_channel=True)
        return made.read_bytes()


def openvino(model: nn.Module, dtype: torch.dtype, example: Tensor, threads: int) -> Peer:
    """OpenVINO on the CPU, for the example's shape."""
    import openvino as ov

    converted = ov.convert_model(model, example_input=example, input=list(example.shape))
    if dtype == torch.int8:
        converted = quantized_openvino(converted, [
            torch.randn(1, *example.shape[1:]).expand_as(example) for _ in range(16)])
    return inferred(converted, "bf16" if dtype == torch.bfloat16 else "f32", threads)


def nncf(model: nn.Module, images: Tensor) -> Peer:
    """NNCF's int8 of the model, calibrated on these images, in OpenVINO on the CPU."""
    import openvino as ov

    converted = ov.convert_model(model, example_input=images[:2], input=[-1, *images.shape[1:]])
    return inferred(quantized_openvino(converted, images.split(1)), "f32", torch.get_num_threads())


def inferred(model: Any, precision: str, threads: int) -> Peer:
    """A model of OpenVINO on the CPU; the precision is that of what is not on int8."""
    import openvino as ov

    request = ov.Core().compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    return lambda x: request.infer([x.numpy()])


def quantized_openvino(model: Any, batches: Sequence[Tensor]) -> Any:
    """The model with NNCF's int8, calibrated on these batches."""
    from nncf import Dataset, ModelType, quantize

    images = [batch.numpy() for batch in batches]
    return quantize(model, Dataset(images), model_type=ModelType.TRANSFORMER,
                    subset_size=len(images))
