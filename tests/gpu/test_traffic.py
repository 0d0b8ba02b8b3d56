"""The bytes that kernels move: a model, and the emulator's count of 32-byte sectors."""

import math
from dataclasses import replace

import pytest
import torch
from ptx.emulate import Launch, emulated
from ptx.machine import GLOBAL_BASE
from stub_driver import compiling_for
from traffic import (
    GPUS,
    ROOT,
    Shape,
    launches,
    moved,
    moved_table,
    moved_with_workspace,
    requested,
    shapes,
    workspace,
)

from adacomcat.kernels import load, tiles

SECTOR = 32


def launch(shape: Shape) -> list[Launch]:
    def e(*size: int) -> torch.Tensor:
        return torch.zeros(*size, dtype=torch.float16)

    m, k, n, r, hidden = shape.m, shape.k, shape.n, shape.r, shape.hidden
    with emulated("sm_80", traffic=True) as found:
        if hidden:
            load("low_rank_mlp").forward(
                e(m, k), e(k, r), e(hidden, r), e(hidden), e(hidden, r), e(n, r), e(n), "relu",
                keep=False,
            )  # fmt: skip
        else:
            load("low_rank_linear").forward(e(m, k), e(k, r), e(n, r), e(n), keep=False)
    return found


def distinct(launch: Launch, parts: bool) -> int:
    """Bytes of the sectors that a launch touches: of the parts of a sum, or of all else."""
    touched = sum(t.astype(int) for t in launch.machine.traffic.touched.values())
    inside = 0
    if "parts_ptr" in launch.tensors:
        start = (launch.addresses["parts_ptr"] - GLOBAL_BASE) // SECTOR
        inside = touched[start : start + launch.tensors["parts_ptr"].nbytes // SECTOR].sum()
    return SECTOR * int(inside if parts else touched.sum() - inside)


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
    found = launch(shape)
    with compiling_for("sm_80"):
        wanted, room = requested(shape), workspace(shape)
        bound, with_parts = (f(shape, GPUS["sm_80"][3]) for f in (moved, moved_with_workspace))
        programs = [one.programs for one in launches(shape)]
    assert [math.prod(one.grid) for one in found] == programs
    # Biases are asked for by each warp that needs them, so the model is a little below.
    asked = SECTOR * sum(sum(one.machine.traffic.requested.values()) for one in found)
    assert wanted <= asked <= 1.15 * wanted
    touched = sum(distinct(one, parts=False) for one in found)
    assert abs(touched - bound) <= 0.01 * bound
    assert touched <= 1.15 * shape.minimum
    parts = [distinct(one, parts=True) for one in found]
    assert parts == [room] * len(found)
    assert abs(touched + sum(parts) - with_parts) <= 0.01 * with_parts


def test_programs_read_their_rows_once() -> None:
    shape = shapes()["DeiT-S b1 fc1"]
    (only,) = launch(shape)
    counts = only.machine.traffic
    with compiling_for("sm_80"):
        parts = shape.shared_out(shape.n)
    assert counts.requested[0, "load"] * SECTOR == 2 * shape.m * shape.k * parts
    assert counts.ideal["store"] * SECTOR == 2 * shape.m * shape.n


@pytest.mark.parametrize("architecture", GPUS)
def test_sharing_out_the_hidden_layer_pays(architecture: str) -> None:
    """At one image the MLP of a program is shorter by far than with all of the hidden layer."""
    with compiling_for(architecture):
        for name in ("DeiT-S b1 MLP", "DeiT-B b1 MLP"):
            shape = shapes()[name]
            asked = max(one.requested / one.programs for one in launches(shape))
            assert len(launches(shape)) == 2 and 3 * asked < shape.weights
        assert len(launches(shapes()["DeiT-S b64 MLP"])) == 1


@pytest.mark.parametrize("architecture", GPUS)
def test_moved_bytes_are_near_the_minimum(architecture: str) -> None:
    """Without the parts of a sum, which only the MLP of one image has; they fit the cache."""
    cache = GPUS[architecture][3]
    with compiling_for(architecture):
        for name, shape in shapes().items():
            assert moved(shape, cache) <= 1.15 * shape.minimum
            with_parts = moved_with_workspace(shape, cache)
            if name.endswith("b1 MLP"):
                assert 1.15 * shape.minimum < with_parts and workspace(shape) < cache / 20
            else:
                assert with_parts <= 1.15 * shape.minimum


def test_the_budgets_state_both_numbers() -> None:
    assert moved_table() in (ROOT / "bench" / "gpu" / "BUDGETS.md").read_text()
