"""Each format: what it needs, how it is written, and how its file runs on images again.

A writer gets the model in eval mode and a file to write; what lies beside that file goes with it.
Libraries are imported where they are used.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adacomcat.checkpoint.folder import load, save
from adacomcat.convert.plain import to_plain
from adacomcat.deploy.dense import to_dense
from adacomcat.errors import UserError

Run = Callable[[Tensor], Tensor]
# ONNX keeps its weights in one file up to the size that its format allows.
ONE_FILE = 1 << 30


@dataclass(frozen=True)
class Request:
    """What a file is to hold."""

    model: nn.Module
    images: Tensor  # (B, C, H, W), an example; a model without dynamic batch keeps this B
    dynamic_batch: bool
    opset: int | None


@dataclass(frozen=True)
class Format:
    """One kind of file or folder.

    Attributes:
        ending: Of the file's name; empty for a checkpoint folder.
        summary: For --help.
        write: Writes the file.
        run: The file → the function that it computes.
        packages: What ``write`` imports beside PyTorch.
        runtime: What ``run`` imports.
        torch_only: Whether PyTorch runs it: then it may be in bfloat16 and on any device.
    """

    ending: str
    summary: str
    write: Callable[[Request, Path], None]
    run: Callable[[Path], Run]
    packages: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    torch_only: bool = False

    @property
    def folder(self) -> bool:
        return not self.ending


def require_packages(format: str, packages: tuple[str, ...]) -> None:
    """
    Raises:
        UserError: One is not installed.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        extra = "executorch" if "executorch" in missing else "export"
        raise UserError(f"format {format} needs {', '.join(missing)}: "
                        f"pip install 'adacomcat[{extra}]'")


def exported_program(request: Request) -> Any:
    """``torch.export``'s program; the ops of this package are PyTorch's operators in it."""
    shapes = ({0: torch.export.Dim("batch", min=1)},) if request.dynamic_batch else None
    with torch.no_grad():
        return torch.export.export(request.model, (request.images,), dynamic_shapes=shapes)


def _write_onnx(request: Request, path: Path) -> None:
    bytes_ = sum(p.numel() * p.element_size() for p in request.model.parameters())
    torch.onnx.export(exported_program(request), (), str(path), dynamo=True, verbose=False,
                      opset_version=request.opset, external_data=bytes_ > ONE_FILE)


def _run_onnx(path: Path) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _write_openvino(request: Request, path: Path) -> None:
    openvino = importlib.import_module("openvino")
    model = openvino.convert_model(exported_program(request))
    half = request.images.dtype == torch.float16
    openvino.save_model(model, str(path), compress_to_fp16=half)


def _run_openvino(path: Path) -> Run:
    openvino = importlib.import_module("openvino")
    # Its default on some CPUs is bfloat16, whatever the file says.
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(str(path), "CPU", config)
    return lambda images: torch.from_numpy(compiled([images.numpy()])[0])


def _write_program(request: Request, path: Path) -> None:
    torch.export.save(exported_program(request), str(path))


def _run_program(path: Path) -> Run:
    return torch.export.load(str(path)).module()


def _write_aoti(request: Request, path: Path) -> None:
    inductor = importlib.import_module("torch._inductor")
    inductor.aoti_compile_and_package(exported_program(request), package_path=str(path))


def _run_aoti(path: Path) -> Run:
    return importlib.import_module("torch._inductor").aoti_load_package(str(path))


def _write_executorch(request: Request, path: Path) -> None:
    exir = importlib.import_module("executorch.exir")
    xnnpack = importlib.import_module(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner")
    program = exir.to_edge_transform_and_lower(
        exported_program(request), partitioner=[xnnpack.XnnpackPartitioner()]).to_executorch()
    path.write_bytes(program.buffer)


def _run_executorch(path: Path) -> Run:
    runtime = importlib.import_module("executorch.runtime").Runtime.get()
    method = runtime.load_program(str(path)).load_method("forward")
    return lambda images: method.execute([images])[0]


FORMATS = {
    "onnx": Format(".onnx", "ONNX, for onnxruntime and TensorRT", _write_onnx, _run_onnx,
                   ("onnx", "onnxscript"), ("onnxruntime",)),
    "openvino": Format(".xml", "OpenVINO's model, with its .bin", _write_openvino, _run_openvino,
                       ("openvino",), ("openvino",)),
    "torch": Format(".pt2", "torch.export's program", _write_program, _run_program,
                    torch_only=True),
    "aoti": Format(".pt2", "machine code by AOTInductor, for this kind of machine", _write_aoti,
                   _run_aoti, torch_only=True),
    "executorch": Format(".pte", "ExecuTorch with XNNPACK, for phones", _write_executorch,
                         _run_executorch, ("executorch",), ("executorch",)),
    "plain": Format("", "a folder of the same factors in nn.Linear layers",
                    lambda request, path: save(to_plain(request.model), path), load,
                    torch_only=True),
    "dense": Format("", "a folder of timm's dense model, factors multiplied out",
                    lambda request, path: save(to_dense(request.model), path), load,
                    torch_only=True),
}

