"""The bytes that kernels move: a model, and the emulator's count of 32-byte sectors."""

from dataclasses import replace

import pytest
import torch
from ptx.emulate import Launch, emulated
from stub_driver import compiling_for
from traffic import GPUS, Shape, moved, requested, shapes

from adacomcat.kernels import load, tiles

SECTOR = 32


def launch(shape: Shape) -> Launch:
    def e(*size: int) -> torch.Tensor:
        return torch.zeros(*size, dtype=torch.float16)

    m, k, n, r, hidden = shape.m, shape.k, shape.n, shape.r, shape.hidden
    with emulated("sm_80", traffic=True) as launches:
        if hidden:
            load("low_rank_mlp").forward(
                e(m, k), e(k, r), e(hidden, r), e(hidden), e(hidden, r), e(n, r), e(n), "relu",
                keep=False,
            )  # fmt: skip
        else:
            load("low_rank_linear").forward(e(m, k), e(k, r), e(n, r), e(n), keep=False)
    (only,) = launches
    return only


B1 = ("DeiT-S b1 proj", "DeiT-S b1 fc1", "DeiT-S b1 fc2", "DeiT-S b1 MLP", "DeiT-B b1 proj",
      "DeiT-B b1 MLP")


@pytest.mark.parametrize("name", B1)
def test_the_model_is_what_the_emulator_counts(name: str) -> None:
    check(shapes()[name])


@pytest.mark.parametrize("name", ["DeiT-S b64 proj", "DeiT-S b64 MLP", "DeiT-B b64 fc1"])
def test_the_model_holds_for_the_tiles_of_large_batches(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks of rows stand for the 99 of a batch of 64, all of which do the same."""
    monkeypatch.setattr(tiles, "multiprocessors", lambda: 1)
    whole = shapes()[name]
    with compiling_for("sm_80"):
        rows = whole.tile.BLOCK_M
    check(replace(whole, m=3 * rows - 7))


def check(shape: Shape) -> None:
    counts = launch(shape).machine.traffic
    with compiling_for("sm_80"):
        wanted, bound = requested(shape), moved(shape, GPUS["sm_80"][3])
    # Biases are asked for by each warp that needs them, so the model is a little below.
    asked = SECTOR * sum(counts.requested.values())
    assert wanted <= asked <= 1.15 * wanted
    distinct = SECTOR * sum(touched.sum() for touched in counts.touched.values())
    assert abs(distinct - bound) <= 0.01 * bound
    assert distinct <= 1.15 * shape.minimum


def test_programs_read_their_rows_once() -> None:
    shape = shapes()["DeiT-S b1 fc1"]
    counts = launch(shape).machine.traffic
    with compiling_for("sm_80"):
        parts = shape.parts
    assert counts.requested[0, "load"] * SECTOR == 2 * shape.m * shape.k * parts
    assert counts.ideal["store"] * SECTOR == 2 * shape.m * shape.n


@pytest.mark.parametrize("architecture", GPUS)
def test_moved_bytes_are_near_the_minimum(architecture: str) -> None:
    with compiling_for(architecture):
        for shape in shapes().values():
            assert moved(shape, GPUS[architecture][3]) <= 1.15 * shape.minimum
