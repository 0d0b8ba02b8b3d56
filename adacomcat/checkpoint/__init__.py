"""Compressed models on disk, and ComCAT's released files."""

from adacomcat.checkpoint.build import create, require_architecture
from adacomcat.checkpoint.config import NO_MODEL_ARGS
from adacomcat.checkpoint.folder import load, require_empty, save
from adacomcat.checkpoint.weights import load_weights_, read_weights
from adacomcat.moved import forward

__all__ = ["NO_MODEL_ARGS", "create", "load", "load_weights_", "read_weights",
           "require_architecture", "require_empty", "save"]

__getattr__ = forward(__name__, ("checkpoint.folder",))
