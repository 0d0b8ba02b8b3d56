"""Files and folders are written whole, or the old content stays and nothing else is left."""

import os
from pathlib import Path

import pytest

from adacomcat.utils import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("durable", [False, True])
def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path, shared: bool,
                                                durable: bool) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with files.atomic_file(path, shared=shared, durable=durable) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old" and scratch.parent == tmp_path
    assert path.read_text() == "new" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(type(error)), files.atomic_file(path) as scratch:
        scratch.write_text("half of")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_a_failed_rename_leaves_the_old_file_alone(tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.atomic_write_text(path, "old")

    def dies(*paths: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(OSError, match="no space"):
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_writers_of_a_shared_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with files.atomic_file(path, shared=True) as one, files.atomic_file(path, shared=True) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one" and names(tmp_path) == ["a.json"]


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "small"
    with files.atomic_folder(folder) as scratch:
        (scratch / "weights").write_text("all")
        assert not folder.exists()
    assert names(folder) == ["weights"] and names(folder.parent) == ["small"]


def test_a_folder_that_holds_something_stays(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    with pytest.raises(OSError), files.atomic_folder(folder) as scratch:
        (scratch / "weights").write_text("all")
    assert names(folder) == ["mine"] and names(tmp_path) == ["small"]
