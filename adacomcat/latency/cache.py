"""Measured milliseconds that outlive the process: one JSON file for each machine and its set-up."""

import hashlib
import json
import math
import os
import platform
from pathlib import Path

import torch
from torch import nn

import adacomcat
from adacomcat.ops import backends
from adacomcat.utils.files import atomic_write_text
from adacomcat.utils.text import parse_json, read_text, to_json

Milliseconds = dict[str, dict[str, float]]  # key of a timed block → ranks → milliseconds


def machine(model: nn.Module) -> dict[str, object]:
    """What the timings of ``model`` depend on beside its shapes."""
    parameter = next(model.parameters())
    on_gpu = parameter.is_cuda
    return {
        "device": torch.cuda.get_device_name(parameter.device) if on_gpu else _cpu_name(),
        "kernels": (backends.build_info() or {}).get("instruction_set"),
        "threads": torch.get_num_threads(), "dtype": str(parameter.dtype),
        "torch": torch.__version__, "adacomcat": adacomcat.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def folder() -> Path | None:
    """Where the files are: under XDG_CACHE_HOME, else under ~/.cache; None for who has no home."""
    home = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    return home / "adacomcat/latency" if home.is_absolute() else None


class LatencyCache:
    """``milliseconds`` as the file of this machine has them; empty where it cannot be read."""

    def __init__(self, machine: dict[str, object]) -> None:
        self.machine = machine
        name = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
        where = folder()
        self.path = None if where is None else where / f"{name}.json"
        self.milliseconds = self._read()

    def _read(self) -> Milliseconds:
        if self.path is None:
            return {}
        try:
            found = parse_json(read_text(self.path))
            entries = found["milliseconds"] if found["machine"] == self.machine else {}
            return {str(key): times for key, times in entries.items() if _plausible(times)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def add(self, key: str, times: dict[str, float]) -> None:
        """Keep ``times``, in the file too where this user can write it.

        Entries that other processes added to the file stay.
        """
        self.milliseconds = self._read() | self.milliseconds | {key: times}
        try:
            self._write()
        except OSError:  # a read-only home: measure again next time
            return

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = to_json({"machine": self.machine, "milliseconds": self.milliseconds}, indent=1)
        atomic_write_text(self.path, content)


def _plausible(times: object) -> bool:
    return isinstance(times, dict) and all(
        type(value) is float and math.isfinite(value) and value > 0 for value in times.values())
