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
    "gated_mlp",
    "rotary_attention",
)
# These have no backward pass; their `forward` gives the result alone.
FOR_INFERENCE = ("gated_mlp", "rotary_attention")
# For inference these ops also take the layer norm before and the residual after the sublayer.
SUBLAYERS = ("low_rank_mlp", "low_rank_attention", *FOR_INFERENCE)
# Registers, shared memory and occupancy of each kernel, written by tools/gpu_resources.py.
KNOWN = Path(__file__).with_name("known.json")
# How the kernels of an architecture were tested; on all others they are only compiled.
SHOWN_BY = {"sm_80": "its PTX, executed", "sm_90": "its tests on an H200"}


def load(op: str) -> ModuleType:
    """Import the module of one op; its launchers are `forward` and `backward`."""
    return import_module(f"{__name__}.{op}")
