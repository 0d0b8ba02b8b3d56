"""adacomcat doctor: versions, which backends run here or why not, the machine; --measure."""

import argparse
import json
import math
import os
import platform
from importlib import metadata
from typing import Any

import torch

import adacomcat
from adacomcat import kernels
from adacomcat.cli.commands import Outcome
from adacomcat.errors import UserError, reason
from adacomcat.latency.self_measurement import measure
from adacomcat.ops import backends, measured
from adacomcat.report.tables import print_table
from adacomcat.utils.machine import device_name

_PACKAGES = ("torch", "timm", "triton", "torchvision", "safetensors", "numpy", "scikit-learn")


def run(args: argparse.Namespace) -> Outcome:
    if args.measure:
        for device in _devices():
            _keep(device, measure(device))
    found = {
        "versions": {"adacomcat": adacomcat.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "backends": backends.available(),
        "build": backends.build_info(),
        "kernels": _kernels(),
        "measured": {device_name(device): times for device in _devices()
                     if (times := measured.read(device))},
        "machine": _machine(),
    }
    return Outcome(found, lambda: _show(found))


def _devices() -> list[torch.device]:
    """The CPU and every GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def _keep(device: torch.device, times: measured.Times) -> None:
    try:
        path = measured.keep(device, times)
    except OSError as error:
        raise UserError(f"cannot keep what was measured: {reason(error)}; XDG_CACHE_HOME names "
                        "another folder") from error
    if path is None:
        raise UserError("there is no home to keep what was measured in: XDG_CACHE_HOME names a "
                        "folder")


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
        "cores": os.cpu_count(),
        **_threads(),
        "load": _load(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "advice": _advice(),
    }


def _threads() -> dict[str, object]:
    """Threads of torch and of the kernels, and what limits the kernels'."""
    cores = backends.cores()
    found: dict[str, object] = {"threads": torch.get_num_threads()}
    if cores:
        found |= {"threads of the kernels": int(cores["threads"]),
                  "cores by affinity": int(cores["affinity"]),
                  "cores by quota": cores["quota"] or "no limit"}
    return found


def _load() -> float | None:
    """Threads that ran or waited for a core in the last minute, on average, of all programs."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _advice() -> list[str]:
    """What to set so that threads and cores fit, if they do not."""
    cores, threads, load = backends.cores(), torch.get_num_threads(), _load()
    usable = int(cores["affinity"]) if cores else os.cpu_count() or 1
    if cores and cores["quota"]:
        usable = min(usable, math.ceil(cores["quota"]))
    advice = []
    if threads > usable:
        advice.append(f"torch.set_num_threads({usable}): that many cores are this process's, and "
                      "PyTorch's own ops run slower on more threads than that")
    if load is not None and load >= (os.cpu_count() or 1):
        advice.append("other programs want these cores too: measure again when they have ended, "
                      "or plan with fewer threads")
    return advice


def _by_architecture(known: list[dict[str, Any]]) -> list[tuple]:
    """A row for each architecture; ``--json`` has one for each kernel."""
    rows = []
    for name in dict.fromkeys(one["architecture"] for one in known):
        ours = [one for one in known if one["architecture"] == name]
        rows.append((name, len(ours), kernels.SHOWN_BY.get(name, "compiling it"),
                     max(one["registers"] for one in ours), sum(one["spilled"] for one in ours)))
    return rows


def _show(found: dict[str, dict]) -> None:
    print_table("versions", ["package", "version"],
                [(name, version or "not installed") for name, version in
                 found["versions"].items()])
    print_table("backends", ["backend", "here"],
                [(name, reason or "runs") for name, reason in found["backends"].items()])
    if found["build"]:
        features = [name for name, there in found["build"]["cpu_features"].items() if there]
        rows = found["build"] | {"cpu_features": ", ".join(features) or "none"}
        print_table("extension", ["", ""], list(rows.items()))
    print_table(f"Triton kernels (triton {found['kernels']['triton']})",
                ["architecture", "kernels", "shown by", "most registers", "bytes spilled"],
                _by_architecture(found["kernels"]["kernels"]))
    for device, times in found["measured"].items():
        print_table(f"measured on {device}: milliseconds, the fastest first", ["op", "backends"],
                    [(key, ", ".join(f"{name} {times[key][name]:.3g}" for name in
                                     sorted(times[key], key=times[key].__getitem__)))
                     for key in times])
    print_table("machine", ["", ""],
                [(name, ", ".join(value) or "none" if isinstance(value, list) else value)
                 for name, value in found["machine"].items()])
