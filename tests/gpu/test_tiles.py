"""The table of tile sizes, and the measured choice that may replace it."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stub_driver import TARGETS, compiling_for

from adacomcat.kernels import tiles

HALF = torch.empty(0, dtype=torch.float16)


@given(rows=st.integers(1, 20000), rank=st.integers(1, 512), name=st.sampled_from(list(TARGETS)))
def test_rows_are_shared_out(rows: int, rank: int, name: str) -> None:
    """One wave of programs where the register file allows it, and no fewer rows than that needs."""
    with compiling_for(name):
        tile = tiles.row_tile(rows, rank, HALF)
        programs, processors = -(-rows // tile.BLOCK_M), tiles.multiprocessors()
    on_chip = tile.BLOCK_M * tiles.padded(rank)
    assert on_chip <= max(16384, 16 * tiles.padded(rank)) and tile.BLOCK_M <= 128
    if programs > processors:
        assert tile.BLOCK_M == 128 or 2 * on_chip > 16384
    if tile.BLOCK_M > 16:
        assert -(-rows // (tile.BLOCK_M // 2)) > processors


@given(rows=st.integers(0, 100000), programs=st.integers(1, 5000))
def test_sums_are_split_in_whole_tiles(rows: int, programs: int) -> None:
    with compiling_for("sm_80"):
        parts = tiles.splits(rows, 64, programs)
    assert parts == 1 or rows // parts >= 4 * 64


@given(columns=st.integers(0, 4000), programs=st.integers(0, 400))
def test_few_rows_are_shared_by_one_wave(columns: int, programs: int) -> None:
    with compiling_for("sm_90"):
        share = tiles.columns_per_part(columns, 64, programs)
    parts = max(1, -(-columns // share))
    assert share % 64 == 0
    assert parts == 1 or parts * programs <= 132
    assert share == 64 or 2 * programs > 132 or (parts + 1) * programs > 132 or (
        -(-columns // (share - 64)) * programs > 132)


def test_autotuning_takes_the_fastest_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiles.Tile(32, 64, 64, 4, 3)
    x, timed = SimpleNamespace(is_cuda=True, dtype=torch.float16), []

    def milliseconds(run: object, tile: tiles.Tile) -> float:
        timed.append(tile)
        return abs(tile.BLOCK_N - 32) + abs(tile.num_warps - 4)

    monkeypatch.setattr(tiles, "_milliseconds", milliseconds)
    monkeypatch.setattr(tiles, "_tuned", {})
    with compiling_for("sm_90"):
        assert tiles.best(table, ("op",), x, print) is table
        monkeypatch.setenv("ADACOMCAT_AUTOTUNE", "1")
        assert tiles.best(table, ("op",), x, print).BLOCK_N == 32
        count = len(timed)
        assert count > 1 and tiles.best(table, ("op",), x, print).BLOCK_N == 32
    assert len(timed) == count
