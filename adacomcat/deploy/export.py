"""A model → a file for another runtime, checked against the model before it has its name."""

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from adacomcat.checkpoint.folder import require_empty
from adacomcat.convert.plain import is_optimized
from adacomcat.deploy.formats import FORMATS, Format, Request, Run, require_packages
from adacomcat.errors import UserError, reason
from adacomcat.fuse import optimize
from adacomcat.latency.timing import interleaved
from adacomcat.layers.packed import unpacked
from adacomcat.utils.model import copied, input_size, unwrapped

# The largest difference from eager that a check lets pass, as a share of the largest output.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
REPEATS = 20


@dataclass(frozen=True)
class Exported:
    """What ``export`` wrote.

    Attributes:
        path: The file or folder.
        format: A name of ``FORMATS``.
        size: Bytes, with the files beside it that belong to it.
        difference: The largest absolute difference of an output from the model's; None where it
            was not checked.
        latency_ms: 'exported', 'eager' and 'optimized' → median milliseconds of a batch.
    """

    path: Path
    format: str
    size: int
    difference: float | None = None
    latency_ms: dict[str, float] | None = None


def export(model: nn.Module, path: str | Path, *, format: str, images: Tensor | None = None,
           batch_size: int = 1, dynamic_batch: bool = False, dtype: torch.dtype | None = None,
           opset: int | None = None, check: bool = True, bench: bool = False) -> Exported:
    """Write ``model`` for another program, and compare what that computes with the model.

    Args:
        model: A model that takes images and returns a tensor: dense, compressed or, but for the
            formats 'plain' and 'dense', from ``adacomcat.optimize``. It stays as it is.
        path: The file to write or replace; for 'plain' and 'dense' an absent or empty folder.
        format: 'onnx', 'openvino', 'torch' (torch.export), 'aoti' (AOTInductor), 'executorch',
            'plain' (a checkpoint folder of ``to_plain(model)``) or 'dense' (of ``to_dense(model)``,
            which timm loads without this package).
        images: A batch (B, C, H, W) that shows the size of images; by default the size that a timm
            model was built for.
        batch_size: Images that the file takes, where ``dynamic_batch`` does not allow any number.
        dynamic_batch: Whether the file takes batches of every size.
        dtype: Of weights and images in the file; the model's by default.
        opset: ONNX's, PyTorch's default where not given.
        check: Run the file on random images and compare. Where its runtime is not installed a
            warning says so.
        bench: Measure the file, the model, and ``optimize(model)`` in turn on the CPU.

    Raises:
        UserError: A package is missing, the model does not fit the format, the place cannot be
            written, or the file computes something else than the model.
    """
    chosen = _require(format, dtype, opset, bench)
    model = copied(unwrapped(model)).eval().requires_grad_(False)
    model = model if chosen.torch_only else model.cpu()
    size = input_size(model) if images is None else tuple(images.shape[1:])
    _require_tensor(model, size)
    own = next(model.parameters()).dtype
    made = unpacked(copied(model)).to(dtype or own)
    example = _images(made, max(2, batch_size) if dynamic_batch else batch_size, size)
    request = Request(made, example, dynamic_batch, opset)
    several = dynamic_batch or chosen.folder
    batches = [_images(model, count, size) for count in dict.fromkeys(
        (1, batch_size, batch_size + 2) if several else (batch_size,))]
    check = check and _can_run(format, chosen)

    def examine(written: Path) -> float | None:
        return _difference(model, chosen.run(written), batches, dtype or own) if check else None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other packages about themselves
        bytes_, difference = _write(request, chosen, format, Path(path), examine)
    latency = _latency(model, chosen.run(Path(path)), example) if bench else None
    return Exported(Path(path), format, bytes_, difference, latency)


def _require(format: str, dtype: torch.dtype | None, opset: int | None, bench: bool) -> Format:
    if format not in FORMATS:
        raise UserError(f"there is no format {format!r:.40}; choose one of {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    require_packages(format, (*chosen.packages, *(chosen.runtime if bench else ())))
    if dtype is not None and dtype not in TOLERANCE:
        raise UserError(f"a model is exported in float32, float16 or bfloat16; got {dtype}")
    if dtype == torch.bfloat16 and not chosen.torch_only:
        raise UserError(f"format {format} takes float32 and float16; bfloat16 is for "
                        + ", ".join(name for name, one in FORMATS.items() if one.torch_only))
    if opset is not None and format != "onnx":
        raise UserError(f"an opset belongs to the format onnx; leave it out for {format}")
    return chosen


@torch.no_grad()
def _require_tensor(model: nn.Module, size: tuple[int, ...]) -> None:
    output = model(_images(model, 1, size))
    if not isinstance(output, Tensor):
        raise UserError(f"the model returns a {type(output).__name__}; wrap it in a module that "
                        "returns one tensor")


def _images(model: nn.Module, count: int, size: tuple[int, ...]) -> Tensor:
    """Random images (count, *size) as ``model`` takes them, the same in every call."""
    images = torch.randn(count, *size, generator=torch.Generator().manual_seed(0))
    return images.to(next(model.parameters()))


def _can_run(name: str, chosen: Format) -> bool:
    missing = [package for package in chosen.runtime if find_spec(package) is None]
    if missing:
        warnings.warn(f"the {name} file is not checked: {', '.join(missing)} is not installed",
                      stacklevel=3)
    return not missing


def _write(request: Request, chosen: Format, name: str, path: Path,
           examine: Callable[[Path], float | None]) -> tuple[int, float | None]:
    """Write beside ``path``, examine, then move to it: (bytes, what ``examine`` found)."""
    if chosen.folder:
        require_empty(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:40]}.", suffix=".partial",
                                         dir=path.parent) as scratch:
            written = Path(scratch) / path.name
            _call_exporter(request, chosen, name, written)
            difference = examine(written)
            files = [file for file in Path(scratch).rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            for made in sorted(Path(scratch).iterdir(), key=lambda made: made == written):
                os.replace(made, path.parent / made.name)
            return size, difference
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _call_exporter(request: Request, chosen: Format, name: str, path: Path) -> None:
    try:
        chosen.write(request, path)
    except (UserError, OSError):
        raise
    except Exception as error:  # whatever an exporter stumbles over
        raise UserError(f"format {name} does not take this model: {reason(error)}") from error


@torch.no_grad()
def _difference(model: nn.Module, run: Run, batches: Sequence[Tensor],
                dtype: torch.dtype) -> float:
    """The largest absolute difference of an output, over these images.

    Raises:
        UserError: It is more than ``TOLERANCE`` allows, or no number.
    """
    worst = 0.0
    for images in batches:
        expected, found = model(images).float(), run(images.to(dtype)).float()
        if found.shape != expected.shape:
            raise UserError(f"the exported file returns {tuple(found.shape)} for {len(images)} "
                            f"images, the model {tuple(expected.shape)}")
        difference = (found.to(expected) - expected).abs().max().item()
        limit = TOLERANCE[dtype] * expected.abs().max().item()
        if not difference <= limit:
            raise UserError(f"the exported file differs from the model by {difference:.2g}, where "
                            f"outputs reach {expected.abs().max().item():.2g}: this exporter or "
                            "runtime computes something else (check=False writes it all the same)")
        worst = max(worst, difference)
    return worst


def _latency(model: nn.Module, run: Run, images: Tensor) -> dict[str, float]:
    own = images.to(next(model.parameters()).dtype)
    runs: dict[str, Callable[[], object]] = {"exported": lambda: run(images),
                                             "eager": lambda: model(own)}
    if not is_optimized(model):
        optimized = optimize(model)
        runs["optimized"] = lambda: optimized(own)
    return interleaved(runs, REPEATS)
