"""Triton kernels, imported as `adacomcat.kernels`; this package imports torch and triton only.

Nothing is imported before `load`: a machine without triton or without a GPU pays nothing.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

KERNELS = (
    "low_rank_linear",
    "gated_low_rank_linear",
    "low_rank_mlp",
    "low_rank_attention",
)
# Those whose forward pass takes a layer norm before and a residual after, for inference.
SUBLAYERS = ("low_rank_mlp", "low_rank_attention")
# Resources of each kernel by architecture, written by tools/gpu_resources.py, and what shows that
# it is right: tests execute the PTX instruction by instruction; elsewhere it is only compiled.
KNOWN = Path(__file__).with_name("known.json")
SHOWN_BY = {"sm_80": "its PTX, executed", "sm_90": "its tests on an H200"}


def load(op: str) -> ModuleType:
    """The module of one op, with its launchers `forward` and `backward`."""
    return import_module(f"{__name__}.{op}")
