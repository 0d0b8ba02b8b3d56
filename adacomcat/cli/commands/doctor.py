"""adacomcat doctor: versions, which backends run here or why not, the machine."""

import argparse
import json
import platform
from importlib import metadata

import torch

import adacomcat
from adacomcat import kernels
from adacomcat.cli.commands import Outcome
from adacomcat.ops import backends
from adacomcat.report.tables import print_table

_PACKAGES = ("torch", "timm", "triton", "torchvision", "safetensors", "numpy", "scikit-learn")


def run(args: argparse.Namespace) -> Outcome:
    found = {
        "versions": {"adacomcat": adacomcat.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "backends": backends.available(),
        "build": backends.build_info(),
        "kernels": _kernels(),
        "machine": _machine(),
    }
    return Outcome(found, lambda: _show(found))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _kernels() -> dict[str, object]:
    """Registers and shared memory of the Triton kernels, noted when they were compiled."""
    return json.loads(kernels.KNOWN.read_text(encoding="utf-8"))


def _machine() -> dict[str, object]:
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
    }


def _show(found: dict[str, dict]) -> None:
    print_table("versions", ["package", "version"],
                [(name, version or "not installed") for name, version in
                 found["versions"].items()])
    print_table("backends", ["backend", "here"],
                [(name, reason or "runs") for name, reason in found["backends"].items()])
    if found["build"]:
        print_table("extension", ["", ""], list(found["build"].items()))
    print_table(
        f"Triton kernels (triton {found['kernels']['triton']})",
        ["kernel", "dtype", "architecture", "shown by", "registers", "spilled", "shared"],
        [(known["kernel"], known["dtype"], known["architecture"],
          kernels.SHOWN_BY.get(known["architecture"], "compiling it"),
          known["registers"], known["spilled"], known["shared"])
         for known in found["kernels"]["kernels"]],
    )
    print_table("machine", ["", ""],
                [(name, ", ".join(value) or "none" if isinstance(value, list) else value)
                 for name, value in found["machine"].items()])
