"""Checksums that find damage: XXH3 with 128 bits, of a file and of tensors with plain values.

XXH3 (xxhash.com) reads memory faster than files are read. It protects from accidents, not from
somebody who means harm.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

_CHUNK = 1 << 22  # bytes


def file_checksum(path: str | Path) -> str:
    """The checksum of a file's content, as 32 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    found = xxhash.xxh3_128()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def checksum(value: Any) -> str:
    """The checksum of tensors, numbers and strings in dicts, lists and tuples.

    Args:
        value: dicts are taken in their order; a tensor counts with its dtype and shape.
    """
    found = xxhash.xxh3_128()
    _update(found, value)
    return found.hexdigest()


def _update(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        found.update(_bytes(value))
    elif isinstance(value, Mapping):
        found.update(f"dict {len(value)}".encode())
        for key, item in value.items():
            _update(found, key)
            _update(found, item)
    elif isinstance(value, list | tuple):
        found.update(f"list {len(value)}".encode())
        for item in value:
            _update(found, item)
    else:
        found.update(f"{type(value).__name__} {value!r}".encode())


def _bytes(tensor: Tensor) -> Any:
    """The elements' memory, without a copy where they lie on the CPU one after the other."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
