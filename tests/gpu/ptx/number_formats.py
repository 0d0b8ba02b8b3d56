"""bfloat16 and tf32 on numpy arrays, which know neither, and constants as PTX spells them."""

import re
from collections.abc import Mapping

import numpy as np


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns → float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 → bit patterns, rounded to the nearest, ties to even; one pattern for NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def truncate_to_tf32(x: np.ndarray) -> np.ndarray:
    """Tensor cores ignore the 13 low bits of a float32 operand; Triton does not round before."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def literal(text: str, wanted: np.dtype, addresses: Mapping[str, int]) -> np.ndarray:
    """A constant operand, or the address that has a name, as one element of the type."""
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        bits = np.array([int(text[2:], 16)], np.uint32)
        return bits.view(np.float32).astype(wanted) if wanted.kind == "f" else bits
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        return np.array([int(text[2:], 16)], np.uint64).view(np.float64)
    number = addresses[text] if text in addresses else int(text.rstrip("U"), 0)
    low = number & (2 ** (8 * wanted.itemsize) - 1)
    return np.array([low], np.dtype(f"u{wanted.itemsize}")).view(wanted)
