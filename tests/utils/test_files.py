"""Files and folders are written whole, or the old content stays and nothing else is left."""

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from adacomcat.errors import UserError
from adacomcat.utils import files

# A child that says when it is inside, and then waits for its end.
HOLD = """
import sys, time
from pathlib import Path
from adacomcat.utils import files
with files.{manager} as scratch:
    if scratch is not None:
        (scratch / "half" if scratch.is_dir() else scratch).write_text("half of")
    print("inside", flush=True)
    time.sleep(600)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def holding(manager: str) -> subprocess.Popen:
    """A process that is inside the context manager."""
    child = subprocess.Popen([sys.executable, "-c", HOLD.format(manager=manager)],
                             stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "inside\n"
    return child


def kill(child: subprocess.Popen) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with files.atomic_file(path, durable=durable) as scratch:
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


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with files.atomic_file(path) as one, files.atomic_file(path) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one" and names(tmp_path) == ["a.json"]


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "small"
    with files.atomic_folder(folder, last="weights") as scratch:
        (scratch / "weights").write_text("all")
        assert not folder.exists()
    assert names(folder) == ["weights"] and names(folder.parent) == ["small"]


def test_a_folder_that_holds_something_stays(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    with pytest.raises(OSError), files.atomic_folder(folder, last="weights") as scratch:
        (scratch / "weights").write_text("all")
    assert names(folder) == ["mine"] and names(tmp_path) == ["small"]


@pytest.mark.parametrize("how", ["empty", "link", "here"])
def test_an_empty_folder_is_filled_where_it_is(how: str, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount, a link and the current folder cannot be replaced; the telling file comes last."""
    folder = tmp_path / "empty"
    folder.mkdir()
    inode = folder.stat().st_ino
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    moved, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), real(a, b)))
    given = {"empty": folder, "link": tmp_path / "link", "here": "."}[how]
    with files.atomic_folder(given, last="config") as scratch:
        for name in ("config", "a", "z"):
            (scratch / name).write_text("all")
    assert names(folder) == ["a", "config", "z"] and folder.stat().st_ino == inode
    assert moved[-1] == "config" and names(tmp_path) == ["empty", "link"]


@pytest.mark.parametrize("manager", ["atomic_file(Path({path!r}))",
                                     "atomic_folder(Path({path!r}), last='half')"])
def test_what_a_killed_writer_left_goes_with_the_next_write(manager: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    child = holding(manager.format(path=str(path)))
    files.atomic_write_text(path, "mine")
    assert len(names(tmp_path)) == 2  # a living writer keeps what it writes
    kill(child)
    assert [name for name in names(tmp_path) if name.endswith(".partial")]
    files.atomic_write_text(path, "again")
    assert names(tmp_path) == ["out"] and path.read_text() == "again"


def test_writers_in_several_processes_leave_each_other_alone(tmp_path: Path) -> None:
    """Also between making a temporary file and locking it, where it looks like a leftover."""
    code = ("import sys; from adacomcat.utils import files\n"
            "for i in range(1500): files.atomic_write_text(sys.argv[1], sys.argv[2] * 5000)")
    children = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "out", letter],
                                 stderr=subprocess.PIPE, text=True) for letter in "abc"]
    assert [child.communicate()[1] for child in children] == [""] * 3
    assert names(tmp_path) == ["out"] and len(set((tmp_path / "out").read_text())) == 1


def test_what_others_write_beside_stays(tmp_path: Path) -> None:
    (tmp_path / ".other.abc.partial").write_text("theirs")
    files.atomic_write_text(tmp_path / "out", "mine")
    assert names(tmp_path) == [".other.abc.partial", "out"]


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127)
    files.atomic_write_text(path, "mine")
    with files.atomic_folder(tmp_path / ("b" * 255), last="a") as scratch:
        (scratch / "a").write_text("mine")
    assert sorted(names(tmp_path)) == ["b" * 255, "ä" * 127]


def test_one_process_at_a_time_is_inside(tmp_path: Path) -> None:
    child = holding(f"exclusive(Path({str(tmp_path / 'lock')!r}), 'out')")
    with pytest.raises(UserError, match="another run is writing out"), \
            files.exclusive(tmp_path / "lock", "out"):
        pass
    kill(child)
    with files.exclusive(tmp_path / "lock", "out"):
        pass


def test_what_cannot_be_written_is_found_before(tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "out", tmp_path / "a" / ("b" * 300)):
        with pytest.raises(UserError, match="cannot write"):
            files.require_writable(path)
    files.require_writable(tmp_path / "above" / "out", size=10)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 91, 9))
    with pytest.raises(UserError, match="make room"):
        files.require_writable(tmp_path / "above" / "out", size=10)
    assert names(tmp_path) == ["file"]
