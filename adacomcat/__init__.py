"""adacomcat: pretrained Vision Transformers made smaller and really faster by low-rank factors.

Importing the package costs nothing: torch and timm load with the first name that needs them, and
the timm entry point registers itself when timm is imported.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

import wrapt

from adacomcat import moved

if TYPE_CHECKING:
    from adacomcat import (
        allocation,
        calibration,
        checkpoint,
        compression,
        convert,
        cost,
        customize,
        data,
        deploy,
        distill,
        elastic,
        errors,
        evaluation,
        factorize,
        families,
        fuse,
        latency,
        layers,
        ops,
        plan,
        quantization,
        report,
        search,
        sites,
        train,
    )
    from adacomcat.calibration import Calibration, calibrate
    from adacomcat.checkpoint import save
    from adacomcat.compression import compress, compress_
    from adacomcat.convert.plain import from_plain, to_plain
    from adacomcat.data.collage import collages, with_collages
    from adacomcat.deploy import export, to_dense
    from adacomcat.distill.recovery import RecoveryConfig, recover
    from adacomcat.elastic import load, save_elastic
    from adacomcat.errors import UserError
    from adacomcat.families import register_attention
    from adacomcat.fuse import optimize
    from adacomcat.layers import LowRankAttention, LowRankLinear, LowRankMlp
    from adacomcat.plan import RankPlan
    from adacomcat.quantization import quantize
    from adacomcat.sites import Site, find_sites

# Public name → the module that defines it.
_HOME = {
    "Calibration": "calibration",
    "LowRankAttention": "layers",
    "LowRankLinear": "layers",
    "LowRankMlp": "layers",
    "RankPlan": "plan",
    "RecoveryConfig": "distill.recovery",
    "Site": "sites",
    "UserError": "errors",
    "calibrate": "calibration",
    "collages": "data.collage",
    "compress": "compression",
    "compress_": "compression",
    "export": "deploy",
    "find_sites": "sites",
    "from_plain": "convert.plain",
    "load": "elastic",
    "optimize": "fuse",
    "quantize": "quantization",
    "recover": "distill.recovery",
    "register_attention": "families",
    "save": "checkpoint",
    "save_elastic": "elastic",
    "to_dense": "deploy",
    "to_plain": "convert.plain",
    "with_collages": "data.collage",
}
__all__ = ["Calibration", "LowRankAttention", "LowRankLinear", "LowRankMlp", "RankPlan",
           "RecoveryConfig", "Site", "UserError", "allocation", "calibrate", "calibration",
           "checkpoint", "collages", "compress", "compress_", "compression", "convert", "cost",
           "customize", "data", "deploy", "distill", "elastic", "errors", "evaluation", "export",
           "factorize", "families", "find_sites", "from_plain", "fuse", "latency", "layers", "load",
           "ops", "optimize", "plan", "quantization", "quantize", "recover", "register_attention",
           "report", "save", "save_elastic", "search", "sites", "to_dense", "to_plain", "train",
           "with_collages"]

# Public modules.
_MODULES = frozenset(__all__) - frozenset(_HOME)

try:
    __version__ = metadata.version("adacomcat")
except metadata.PackageNotFoundError:
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"adacomcat.{_HOME[name]}"), name)
    if name in _MODULES or name in moved.MOVED:
        return importlib.import_module(f"adacomcat.{name}")
    raise AttributeError(f"module 'adacomcat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


moved.install()
wrapt.register_post_import_hook("adacomcat.entrypoint:register", "timm")
wrapt.register_post_import_hook("adacomcat.entrypoint.transformers:register",
                                "transformers.quantizers.auto")
