"""Files and folders that are written whole or not at all, and locks that die with their process.

The content is written under a temporary name beside its target, then renamed. A reader finds the
old content or the new one. A write that fails, also on a full disk, leaves the old content as it
was and removes the temporary one. A process that is killed leaves its temporary one, whose name
ends in ``.partial``; the next writer of the same target removes it.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from adacomcat.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: what killed processes leave there stays, and runs do not exclude
    fcntl = None

# Longer names of targets are cut in temporary names, which may have 255 bytes.
_NAME_BYTES = 200


@contextmanager
def atomic_file(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """The path to write to inside the ``with`` block; afterwards the file stands at ``path``.

    Several processes may write the same file: the last one to finish wins.

    Args:
        path: the file to write or replace; its folder exists.
        durable: wait until the content and the name are on the disk.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    with _scratch(path, Path.touch) as scratch:
        yield scratch
        if durable:
            _to_disk(scratch)
        os.replace(scratch, path)
    if durable:
        _to_disk(path.parent)


def atomic_write_text(path: str | Path, text: str, *, durable: bool = False) -> None:
    """``Path.write_text``, whole or not at all, as UTF-8; for the errors see ``atomic_file``."""
    with atomic_file(path, durable=durable) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: str | Path, *, last: str) -> Iterator[Path]:
    """The folder to fill with files inside the ``with`` block; afterwards it stands at ``folder``.

    All is on the disk before the folder has its name. A folder that cannot take another one's
    place (a mount, or the one that a process works in) gets the files one by one, ``last`` at the
    end: whoever looks for that file finds all others with it.

    Args:
        folder: an absent or empty folder; folders above it are made where they are missing.
        last: the name of a file inside, without which the folder counts as empty.

    Raises:
        OSError: the folder cannot be written, or something stands there already.
    """
    folder = Path(os.path.realpath(folder))
    place = folder if folder.is_dir() else folder.parent
    make_folder(place)
    with _scratch(folder, Path.mkdir) as scratch:
        yield scratch
        for file in [*scratch.iterdir(), scratch]:
            _to_disk(file)
        _take_place(scratch, folder, last)
    _to_disk(folder)
    _to_disk(folder.parent)


def make_folder(folder: str | Path) -> None:
    """Make a folder and those above it where they are missing, and wait until the disk has them.

    Raises:
        OSError: the folder cannot be made.
    """
    missing = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in missing:
        _to_disk(path.parent)


def require_writable(path: str | Path, size: int = 0) -> None:
    """Try what writing ``path`` will take, and leave nothing behind.

    Args:
        path: a file or folder that is to be made later, with the folders above it.
        size: bytes that it will have.

    Raises:
        UserError: a folder cannot be made there, or the disk has no room for ``size`` bytes.
    """
    path = Path(os.path.realpath(path))
    above = next(folder for folder in path.parents if folder.exists())
    try:
        for name in path.relative_to(above).parts:
            with suppress(FileNotFoundError):
                (above / name).lstat()  # the name may be too long
            trial = above / _scratch_name(name)
            trial.mkdir()
            trial.rmdir()
        free = shutil.disk_usage(above).free
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name another place, or "
                        "mend this one") from error
    if free < size:
        raise UserError(f"cannot write {path}: it needs about {size / 1e6:.0f} MB, and the disk "
                        f"has {free / 1e6:.0f} MB left; make room or name another place")


@contextmanager
def exclusive(path: str | Path, what: str) -> Iterator[None]:
    """Inside, no other process is inside with the same ``path``, a file that is made for this.

    The lock ends with its process, however that ends.

    Args:
        path: the lock file; its folder exists.
        what: what the error says is in use.

    Raises:
        UserError: another process is inside.
    """
    with Path(path).open("a+", encoding="utf-8") as file:
        try:
            _lock(file.fileno())
        except BlockingIOError as error:
            raise UserError(f"another run is writing {what}; wait until it ends, or name another "
                            "output") from error
        except OSError:  # a file system without locks
            pass
        yield


def is_locked(path: str | Path) -> bool:
    """Whether another process is inside ``exclusive`` with this path."""
    if fcntl is None or not Path(path).is_file():
        return False
    with _opened(Path(path)) as descriptor:
        try:
            _lock(descriptor)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            pass
    return False


@contextmanager
def _scratch(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary file or folder beside ``path``, or inside it where it is a folder.

    A lock tells other processes that its writer lives. It is gone after.
    """
    place = path if path.is_dir() else path.parent
    _remove_leftovers(place, path.name)
    scratch, descriptor = _claimed(place, path.name, make)
    try:
        yield scratch
    finally:
        if descriptor is not None:
            os.close(descriptor)
        _remove(scratch)


def _claimed(place: Path, name: str, make: Callable[[Path], None]) -> tuple[Path, int | None]:
    """A temporary path that was made, and the descriptor that holds its lock.

    Before it is locked another writer may take it for a leftover: then the next one is tried.
    """
    while True:
        scratch = place / _scratch_name(name)
        make(scratch)
        if fcntl is None:
            return scratch, None
        with suppress(FileNotFoundError):
            descriptor = os.open(scratch, os.O_RDONLY)
            try:
                _lock(descriptor)
            except BlockingIOError:
                os.close(descriptor)
                continue
            except OSError:  # a file system without locks, where nobody removes leftovers
                pass
            if scratch.exists():
                return scratch, descriptor
            os.close(descriptor)


def _prefix(name: str) -> str:
    return f".{os.fsdecode(os.fsencode(name)[:_NAME_BYTES])}."


def _scratch_name(name: str) -> str:
    return f"{_prefix(name)}{uuid4().hex[:12]}.partial"


def _remove_leftovers(place: Path, name: str) -> None:
    """Remove what killed writers left: a living one holds a lock on its temporary path."""
    if fcntl is None or not place.is_dir():
        return
    for path in place.iterdir():
        if not (path.name.startswith(_prefix(name)) and path.name.endswith(".partial")):
            continue
        with suppress(OSError), _opened(path) as descriptor:
            _lock(descriptor)
            _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY if fcntl is not None else os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock until the descriptor is closed.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if fcntl is None and path.is_dir():  # Windows opens no folders
        return
    with _opened(path) as descriptor:
        os.fsync(descriptor)


def _take_place(scratch: Path, folder: Path, last: str) -> None:
    """Rename ``scratch`` to ``folder``; where that folder exists, its files move one by one."""
    if not folder.is_dir():
        os.replace(scratch, folder)
        return
    others = [path for path in folder.iterdir() if path != scratch]
    if others:
        raise FileExistsError(f"{folder} holds {others[0].name}")
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == last):
        os.replace(path, folder / path.name)
