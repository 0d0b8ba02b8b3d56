"""Models for other programs: files for their runtimes, and timm folders that need no package."""

from adacomcat.deploy.dense import to_dense
from adacomcat.deploy.export import Exported, export
from adacomcat.deploy.formats import FORMATS

__all__ = ["FORMATS", "Exported", "export", "to_dense"]
