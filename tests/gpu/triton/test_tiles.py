"""The table of tile sizes, and the measured choice that may replace it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stub_driver import TARGETS, compiling_for

from adacomcat.kernels import tiles

HALF = torch.empty(0, dtype=torch.float16)


@given(rows=st.integers(1, 20000), rank=st.integers(1, 128), name=st.sampled_from(list(TARGETS)),
       least=st.sampled_from([16, 64]))
def test_rows_are_shared_out(rows: int, rank: int, name: str, least: int) -> None:
    """One wave of programs where the register file allows it, and no fewer rows than that needs."""
    with compiling_for(name):
        tile = tiles.row_tile(rows, rank, HALF, least=least)
        programs, processors = -(-rows // tile.BLOCK_M), tiles.multiprocessors()
    assert tile.BLOCK_M * tiles.padded(rank) <= 16384 and tile.BLOCK_M <= 128
    if programs > processors:
        assert tile.BLOCK_M == 128
    if tile.BLOCK_M > 16:
        half = tile.BLOCK_M // 2
        assert -(-rows // half) > processors or half < min(least, rows)


@given(rows=st.integers(1, 20000), inner=st.integers(1, 4000), rank=st.integers(1, 512))
def test_two_launches_are_for_wide_ranks_or_few_rows_and_a_large_factor(
    rows: int, inner: int, rank: int
) -> None:
    with compiling_for("sm_90"):
        two = tiles.takes_two_launches(rows, inner, rank, HALF)
    assert two == (rank > 128 or -(-rows // 64) < 132 / 2 and inner * rank > 65536)


@given(rows=st.integers(1, 20000), columns=st.integers(1, 4000))
def test_products_keep_half_of_the_processors_busy(rows: int, columns: int) -> None:
    """The largest tile that does, or the smallest of all."""
    with compiling_for("sm_80"):
        tile = tiles.matmul_tile(rows, columns, HALF)
    programs = -(-rows // tile.BLOCK_M) * -(-columns // tile.BLOCK_N)
    assert programs >= 54 or (tile.BLOCK_M, tile.BLOCK_N) == (16, 32)


@given(rows=st.integers(0, 100000), programs=st.integers(1, 5000))
def test_sums_are_split_in_whole_tiles(rows: int, programs: int) -> None:
    with compiling_for("sm_80"):
        parts = tiles.splits(rows, 64, programs)
    assert parts == 1 or rows // parts >= 4 * 64


@pytest.mark.parametrize("name, most", [("sm_80", 108), ("sm_90", 132)])
@given(columns=st.integers(0, 4000), programs=st.integers(0, 400))
def test_few_rows_are_shared_out(name: str, most: int, columns: int, programs: int) -> None:
    """By as many as are wanted, a dozen to the same rows; one fewer block each would be more."""
    with compiling_for(name):
        share = tiles.columns_per_program(columns, 64, programs)
    parts = max(1, -(-columns // share))
    assert share % 64 == 0
    assert parts == 1 or parts <= 12 and parts * programs <= most
    more = -(-columns // (share - 64)) if share > 64 else 0
    assert share == 64 or more > 12 or more * max(programs, 1) > most or 2 * programs > most


def test_autotuning_takes_the_fastest_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiles.Tile(32, 64, 64, 4, 3)
    x: Any = SimpleNamespace(is_cuda=True, dtype=torch.float16)
    timed: list[tiles.Tile] = []

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
