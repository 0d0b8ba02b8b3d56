"""Measured milliseconds: of whole models, of their blocks at any ranks, kept for each machine."""

from adacomcat.moved import forward

__getattr__ = forward(__name__, ("latency.timing", "latency.blocks", "latency.table"))
