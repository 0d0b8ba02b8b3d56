"""Triton kernels, imported as `adacomcat.kernels`; this package imports torch and triton only."""

# Op name -> launcher.
KERNELS: dict[str, object] = {}
