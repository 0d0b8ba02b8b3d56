"""A disk that is full, a process that dies, and power that goes, at the n-th change of a folder."""

import ctypes
import json
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_suffix(".c")
KILL, FULL = range(2)  # the modes of bad_disk.c
Names = dict[str, tuple[int, bool]]  # name in a folder → inode, whether it is a folder


def build(folder: Path) -> Path:
    """The shared library of bad_disk.c."""
    library = folder / "bad_disk.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


class Trouble(NamedTuple):
    """What happens at change number ``at`` of ``folder``; 0: nothing, changes are logged only."""

    folder: str
    at: int = 0
    mode: int = KILL
    log: str | None = None  # a file that gets one line for each change
    platter: str | None = None  # a folder that keeps what reached the disk

    def arm(self) -> None:
        """Begin, in a process that has the library preloaded."""
        if self.platter is not None:
            _Platter(Path(self.folder), Path(self.platter)).watch()
        log = -1 if self.log is None else os.open(self.log, os.O_CREAT | os.O_WRONLY, 0o600)
        ctypes.CDLL(None).disk_arm(self.folder.encode(), ctypes.c_long(self.at), self.mode, log)


class _Platter:
    """Keeps what is synced: INODE.data of files, INODE.json with the names in folders."""

    def __init__(self, folder: Path, platter: Path) -> None:
        self.folder, self.platter = folder, platter
        self.descriptors: list[int] = []  # while these are open no inode is used again

    def watch(self) -> None:
        """From now on ``os.fsync`` writes to the platter; what is there already is on it."""
        real = os.fsync
        for path in [self.folder, *self.folder.rglob("*")]:
            descriptor = os.open(path, os.O_RDONLY)
            self._keep(descriptor)
            os.close(descriptor)

        def fsync(descriptor: int) -> None:
            real(descriptor)
            self._keep(descriptor)
        os.fsync = fsync

    def _keep(self, descriptor: int) -> None:
        found, source = os.fstat(descriptor), f"/proc/self/fd/{descriptor}"
        self.descriptors.append(os.dup(descriptor))
        is_folder = stat.S_ISDIR(found.st_mode)
        target = self.platter / f"{found.st_ino}.{'json' if is_folder else 'data'}"
        scratch = target.with_suffix(".new")
        if is_folder:
            scratch.write_text(json.dumps(_names(Path(source))))
        else:
            shutil.copyfile(source, scratch)
        scratch.replace(target)


def _names(folder: Path) -> Names:
    with os.scandir(folder) as entries:
        return {entry.name: (entry.inode(), entry.is_dir()) for entry in entries}


def cut_power(folder: Path, platter: Path, *, names: bool, contents: float,
              draw: random.Random) -> None:
    """What ``folder`` holds when the power is back, after the process that changed it has died.

    Args:
        folder: as the process left it.
        platter: what it had synced.
        names: the names that were not synced reached the disk, too.
        contents: the part of the files that were not synced, and reached the disk all the same.
        draw: decides which ones.
    """
    real = {path.stat().st_ino: path for path in [folder, *folder.rglob("*")]}

    def entries(inode: int) -> Names:
        if names and inode in real:
            return _names(real[inode])
        synced = platter / f"{inode}.json"
        return json.loads(synced.read_text()) if synced.exists() else {}

    def files(inode: int, place: Path) -> Iterator[tuple[Path, Path | None]]:
        place.mkdir()
        for name, (child, is_folder) in entries(inode).items():
            if is_folder:
                yield from files(child, place / name)
                continue
            synced = platter / f"{child}.data"
            lucky = child in real and draw.random() < contents
            yield place / name, synced if synced.exists() else real[child] if lucky else None

    after = folder.with_name("after")
    for target, source in files(folder.stat().st_ino, after):
        target.write_bytes(b"" if source is None else source.read_bytes())
    shutil.rmtree(folder)
    after.rename(folder)
