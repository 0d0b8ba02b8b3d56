"""Measured milliseconds that outlive the process: one JSON file for each machine and its set-up."""

import hashlib
import json
import math

import torch
from torch import nn

import adacomcat
from adacomcat.ops import backends
from adacomcat.utils.files import atomic_write_text
from adacomcat.utils.machine import cache_folder, device_name
from adacomcat.utils.text import parse_json, read_text, to_json

Milliseconds = dict[str, dict[str, float]]  # key of a timed block → ranks → milliseconds


def machine(model: nn.Module) -> dict[str, object]:
    """What the timings of ``model`` depend on beside its shapes."""
    parameter = next(model.parameters())
    return {
        "device": device_name(parameter.device),
        "kernels": (backends.build_info() or {}).get("instruction_set"),
        "threads": torch.get_num_threads(), "dtype": str(parameter.dtype),
        "torch": torch.__version__, "adacomcat": adacomcat.__version__,
    }


class LatencyCache:
    """``milliseconds`` as the file of this machine has them; empty where it cannot be read."""

    def __init__(self, machine: dict[str, object]) -> None:
        self.machine = machine
        name = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
        where = cache_folder("latency")
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
