"""A trained model → the same model on int8: what stands between layers folded, weights rounded."""

from adacomcat.quantization.model import quantize

__all__ = ["quantize"]
