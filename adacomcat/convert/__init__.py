"""A plan and a dense model → the compressed model: calibrate, factorise, install."""

from adacomcat.convert.factors import error_curves, factorize_model
from adacomcat.convert.install import build_skeleton, install_
from adacomcat.convert.model import convert_
from adacomcat.moved import forward

__all__ = ["build_skeleton", "convert_", "error_curves", "factorize_model", "install_"]

__getattr__ = forward(
    __name__, ("compression", "convert.factors", "convert.install", "convert.model"))
