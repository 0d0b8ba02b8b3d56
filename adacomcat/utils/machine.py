"""What this machine is called, and where measurements of it are kept."""

import os
import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cache_folder(kind: str) -> Path | None:
    """Where files of a kind are: under XDG_CACHE_HOME, else under ~/.cache; None for who has no
    home.
    """
    home = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    return home / "adacomcat" / kind if home.is_absolute() else None
