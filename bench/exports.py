"""The table of docs/export.md: differences and latencies of exported models, interleaved.

    python bench/exports.py --formats onnx openvino --threads 2

Weights are random: neither figure depends on them much. Each row compares the exported compressed
model with the exported dense one, in the same runtime.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import adacomcat
from adacomcat.deploy import FORMATS, export
from adacomcat.latency.timing import interleaved
from adacomcat.utils.model import input_size

MODELS = ("vit_small_patch16_224", "vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224")


def versions(model: nn.Module) -> dict[str, nn.Module]:
    small = adacomcat.compress(model, keep_params=0.5)
    return {"dense": model, "compressed": small, "optimized": adacomcat.optimize(small)}


def row(name: str, format: str, folder: Path, repeats: int) -> list[str]:
    """Cells: model, format, the two differences, milliseconds, and dense over each other one."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000).eval()
    runs: dict[str, Callable[[], object]] = {}
    differences = {}
    images: Tensor = torch.randn(1, *input_size(model))
    for version, one in versions(model).items():
        path = folder / f"{name}-{format}-{version}{FORMATS[format].ending}"
        made = export(one, path, format=format, dynamic_batch=format != "executorch")
        differences[version] = made.difference
        run = FORMATS[format].run(path)
        runs[version] = lambda run=run: run(images)
    ms = interleaved(runs, repeats)
    return [name, format, *(f"{differences[v]:.0e}" for v in ("compressed", "optimized")),
            f"{ms['dense']:.1f}", *(f"{ms['dense'] / ms[v]:.2f}" for v in ("compressed",
                                                                         "optimized"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--formats", nargs="*", default=["onnx", "openvino"], choices=FORMATS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    print("| model | format | difference, compressed | difference, optimized | dense, ms "
          "| dense ÷ compressed | dense ÷ optimized |\n|" + " --- |" * 7)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            for format in args.formats:
                print("|", " | ".join(row(name, format, Path(folder), args.repeats)), "|",
                      flush=True)


if __name__ == "__main__":
    main()
