"""adacomcat: pretrained Vision Transformers made smaller and really faster by low-rank factors.

Importing the package costs nothing: torch and timm load with the first name that needs them, and
the timm entry point registers itself when timm is imported.
"""

import importlib
from importlib import metadata
from typing import Any

import wrapt

_HOME = {
    "RankPlan": "plan",
    "Site": "sites",
    "find_sites": "sites",
    "UserError": "errors",
    "compress": "convert",
    "compress_": "convert",
    "LowRankLinear": "layers",
    "LowRankMlp": "layers",
    "LowRankAttention": "attention",
    "save": "checkpoint",
    "load": "checkpoint",
    "optimize": "fuse",
    "collages": "collage",
    "with_collages": "collage",
    "recover": "distill.recovery",
    "RecoveryConfig": "distill.recovery",
}
_MODULES = ("allocate", "attention", "backends", "calibrate", "checkpoint", "collage", "convert",
            "cost", "factorize", "fuse", "layers", "ops", "plan", "reference", "sites", "train")

__all__ = [*sorted(_HOME), *_MODULES]

try:
    __version__ = metadata.version("adacomcat")
except metadata.PackageNotFoundError:
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"adacomcat.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"adacomcat.{name}")
    raise AttributeError(f"module 'adacomcat' has no attribute {name!r}")


wrapt.register_post_import_hook("adacomcat.entrypoint:register", "timm")
