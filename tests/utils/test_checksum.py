"""Checksums change with every part of what they cover."""

import random
from pathlib import Path

import pytest
import torch
import xxhash

from adacomcat.utils.checksum import checksum, file_checksum


def test_a_file_of_several_chunks(tmp_path: Path) -> None:
    content = random.Random(0).randbytes((1 << 22) + 12345)
    (tmp_path / "file").write_bytes(content)
    assert file_checksum(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_every_element_counts(dtype: torch.dtype) -> None:
    tensor = (torch.randn(7, 5) > 0).to(dtype)
    found = {checksum(tensor)}
    for i in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[i] = not other.view(-1)[i]
        found.add(checksum(other))
    assert len(found) == tensor.numel() + 1


def test_layout_in_memory_does_not_count() -> None:
    tensor = torch.randn(6, 4)
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor)
    assert checksum(tensor[::2]) == checksum(tensor[::2].clone())


def test_types_shapes_and_structure_count() -> None:
    zeros = torch.zeros(2, 3)
    values = [zeros, zeros.T, zeros.flatten(), zeros.int(), {"a": zeros}, {"b": zeros}, [zeros],
              [zeros, zeros], [[zeros], zeros], [], {}, None, 0, 0.0, False, "0", "", [0, 0],
              torch.tensor(0.0), torch.empty(0)]
    assert len({checksum(value) for value in values}) == len(values)
