"""The training state on disk: whole, checked, written as it was handed over."""

import io
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import small_run
from torch import nn

from adacomcat.distill import state
from adacomcat.errors import UserError
from adacomcat.utils.checksum import checksum


def test_every_damaged_bit_of_a_state_is_found(tmp_path: Path) -> None:
    """Anywhere in the file, and in the values of every tensor."""
    small_run(epochs=1, steps=1, state_dir=str(tmp_path))
    path = tmp_path / state.FILE
    whole, good = path.read_bytes(), checksum(state.load_state(tmp_path))
    generator = random.Random(0)
    for _ in range(60):
        at, bit = generator.randrange(len(whole)), 1 << generator.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
        try:
            assert checksum(state.load_state(tmp_path)) == good  # padding between the tensors
        except UserError as error:
            assert state.FILE in str(error)
    torch.save(torch.load(io.BytesIO(whole)) | {"epoch": 5}, path)
    with pytest.raises(UserError, match="damaged"):
        state.load_state(tmp_path)


@pytest.mark.parametrize("change", [
    {"ema": None}, {"search": None}, {"config": None}, {"student": None}, {"optimizer": {}},
    {"student": {}}, {"search": {"gates": {}}},
])
def test_a_state_of_another_layout_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    small_run(epochs=1, steps=1, state_dir=str(tmp_path))
    found = state.load_state(tmp_path)
    state.save_state(tmp_path, {key: value for key, value in (found | change).items()
                                if key not in ("format", "checksum")})
    with pytest.raises(UserError, match="remove it and begin anew"):
        small_run(epochs=1, steps=1, state_dir=str(tmp_path), resume=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"\x80\x04N.",
                                     b"\x80\x02](((((((."])
def test_a_foreign_training_state_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / state.FILE).write_bytes(content)
    with pytest.raises(UserError, match=state.FILE):
        state.load_state(tmp_path)


def test_a_training_state_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"format": state.FORMAT, "model": nn.Linear(1, 1)}, tmp_path / state.FILE)
    with pytest.raises(UserError, match="cannot read"):
        state.load_state(tmp_path)


def test_a_failed_save_leaves_the_old_state(tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    state.save_state(tmp_path, {"epoch": 1})
    real = torch.save

    def dies(state: object, file: Any) -> None:
        real(state, file)
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(UserError, match="no space left; the state before it stays"):
        state.save_state(tmp_path, {"epoch": 2})
    writer = state.StateWriter(tmp_path)
    writer.write({"epoch": 3})
    with pytest.raises(UserError, match="no space"):
        writer.finish()
    monkeypatch.undo()
    assert state.load_state(tmp_path)["epoch"] == 1


def test_a_state_is_written_as_it_was_handed_over(tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    go, real = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (go.wait(), real(*args)))
    weights, losses = torch.zeros(3), [1.0]
    writer = state.StateWriter(tmp_path)
    writer.write({"weights": weights, "losses": losses})
    weights += 1
    losses.append(2.0)
    go.set()
    writer.finish()
    found = state.load_state(tmp_path)
    assert found["weights"].tolist() == [0, 0, 0] and found["losses"] == [1.0]


def test_a_copy_takes_the_memory_of_the_one_before() -> None:
    """A tensor of another shape, as after a search, gets memory of its own."""
    kept = state._snapshot({"a": torch.randn(3, 4), "b": [torch.ones(2), 5], "c": torch.zeros(2)})
    given = {"a": torch.randn(3, 4), "b": [torch.zeros(2), 6, "x"], "c": torch.ones(3)}
    found = state._snapshot(given, kept)
    assert found["a"] is kept["a"] and torch.equal(found["a"], given["a"])
    assert found["b"][0] is kept["b"][0] and found["b"][0].tolist() == [0, 0]
    assert found["b"][1:] == [6, "x"]
    assert torch.equal(found["c"], torch.ones(3)) and found["c"] is not given["c"]
