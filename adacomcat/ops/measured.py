"""The backends' milliseconds as this machine measured them, which ``pick`` follows.

``latency.self_measurement`` measures them for ``adacomcat doctor --measure``. A file for each
device keeps them; another version of torch or of this package measures anew.
"""

import hashlib
import json
import math
from functools import cache
from pathlib import Path

import torch

import adacomcat
from adacomcat.utils.files import atomic_write_text
from adacomcat.utils.machine import cache_folder, device_name
from adacomcat.utils.text import parse_json, read_text, to_json

MARGIN = 1.1  # less is noise

Times = dict[str, dict[str, float]]  # what was timed, see ``key`` → backend → milliseconds


def key(op: str, dtype: torch.dtype, training: bool) -> str:
    """'low_rank_mlp float32 inference'."""
    name = str(dtype).removeprefix("torch.")
    return f"{op} {name} {'training' if training else 'inference'}"


def ranked(op: str, device: torch.device, dtype: torch.dtype, training: bool) -> tuple[str, ...]:
    """The measured backends of an op; empty where it was not measured.

    Those within ``MARGIN`` of the fastest come first, in the order of ``backends.PREFERENCE``.
    """
    return _ranked(op, device.type, device.index, dtype, training)


@cache  # small models feel every look-up
def _ranked(op: str, kind: str, index: int | None, dtype: torch.dtype,
            training: bool) -> tuple[str, ...]:
    if kind not in ("cpu", "cuda"):
        return ()
    device = torch.device(kind if index is None else f"{kind}:{index}")
    times = read(device).get(key(op, dtype, training), {})
    most = MARGIN * min(times.values(), default=0.0)
    return tuple(sorted(times, key=lambda name: times[name] > most))


def read(device: torch.device) -> Times:
    """What was measured on ``device``; empty where nothing was, or the file cannot be read."""
    path = where(device)
    if path is None:
        return {}
    try:
        found = parse_json(read_text(path))
        entries = found["milliseconds"] if found["machine"] == _machine(device) else {}
        return {str(name): times for name, times in entries.items() if _plausible(times)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def keep(device: torch.device, times: Times) -> Path | None:
    """Keep ``times`` in the file of ``device`` and follow them; its path, None without a home.

    Raises:
        OSError: it cannot be written.
    """
    path = where(device)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, to_json({"machine": _machine(device), "milliseconds": times},
                                        indent=1))
    _ranked.cache_clear()
    return path


def where(device: torch.device) -> Path | None:
    """The file of ``device``; None without a home."""
    folder = cache_folder("backends")
    name = hashlib.sha256(json.dumps(_machine(device), sort_keys=True).encode()).hexdigest()[:16]
    return None if folder is None else folder / f"{name}.json"


def _machine(device: torch.device) -> dict[str, str]:
    return {"device": device_name(device), "torch": torch.__version__,
            "adacomcat": adacomcat.__version__}


def _plausible(times: object) -> bool:
    return isinstance(times, dict) and all(
        type(value) is float and math.isfinite(value) and value > 0 for value in times.values())
