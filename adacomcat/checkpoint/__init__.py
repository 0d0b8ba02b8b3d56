"""Compressed models on disk, and ComCAT's released files."""

from adacomcat.checkpoint.folder import (
    CONFIG,
    is_checkpoint,
    load,
    require_architecture,
    require_empty,
    save,
)
from adacomcat.checkpoint.weights import load_weights_, read_weights
from adacomcat.moved import forward

__all__ = ["CONFIG", "is_checkpoint", "load", "load_weights_", "read_weights",
           "require_architecture", "require_empty", "save"]

__getattr__ = forward(__name__, ("checkpoint.folder",))
