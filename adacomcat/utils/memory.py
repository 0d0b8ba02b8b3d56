"""Memory that this process has freed, for the system."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it for itself.

    glibc keeps what lies between pieces that are still in use: of a model of which every other
    tensor is freed, nearly all.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
