"""The compiled extension: whether it loads, how it was built, and what it is told of PyTorch."""

from importlib import import_module
from typing import Any

import torch


def _load() -> tuple[Any, str | None]:
    """The extension, or the reason why there is none."""
    try:
        return import_module("adacomcat._C"), None
    except ModuleNotFoundError:
        return None, "the C++ extension was not built: install again where torch is installed"
    except ImportError as error:
        return None, f"the C++ extension does not load ({error}): install again with this torch"


MODULE, MISSING = _load()
# "ieee", "tf32", "bf16" or "none". The property of torch.backends takes ten times as long.
_float32_precision = getattr(torch._C, "_get_fp32_precision_getter", lambda *_: "none")
_reduced = False


def follow_precision() -> None:
    """Tell the kernels what ``torch.set_float32_matmul_precision`` allows float32 products.

    PyTorch's stable ABI does not let them ask, so whoever calls a kernel calls this first.
    """
    global _reduced
    reduced = _float32_precision("mkldnn", "matmul") in ("tf32", "bf16")
    if reduced != _reduced and MODULE is not None:
        MODULE.reduce_float32(reduced)
        _reduced = reduced


def cores() -> dict[str, float]:
    """Cores that affinity and quota (0: no limit) allow, threads of an op; empty without C++."""
    return {} if MODULE is None else MODULE.cores()


def build_info() -> dict[str, object] | None:
    """Compiler, torch and CPU features of the C++ extension; None without one."""
    return None if MODULE is None else MODULE.build_info()
