"""Weights and statistics of their inputs → nested low-rank factors."""

from adacomcat.moved import forward

__getattr__ = forward(__name__, ("factorize.factors", "factorize.linalg"))
