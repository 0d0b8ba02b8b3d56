"""Compressed models on disk, and ComCAT's released files."""

from adacomcat.checkpoint.build import create, outline, require_architecture
from adacomcat.checkpoint.config import CONFIG, NO_MODEL_ARGS
from adacomcat.checkpoint.folder import is_checkpoint, load, require_empty, save
from adacomcat.checkpoint.foreign import load_foreign_
from adacomcat.checkpoint.weights import load_weights_, read_weights
from adacomcat.moved import forward

__all__ = ["CONFIG", "NO_MODEL_ARGS", "create", "is_checkpoint", "load", "load_foreign_",
           "load_weights_", "outline", "read_weights", "require_architecture",
           "require_empty", "save"]

__getattr__ = forward(__name__, ("checkpoint.folder",))
