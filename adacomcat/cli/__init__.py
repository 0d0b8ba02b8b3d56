"""The command line."""

from adacomcat.cli.main import main
from adacomcat.moved import forward

__all__ = ["main"]
__getattr__ = forward(__name__, ("cli.main",))
