"""Files and folders that are written whole or not at all.

The content is written under a temporary name beside its target, then renamed. A reader finds the
old content or the new one. A write that fails, also on a full disk, leaves the old content as it
was and removes the temporary one. A process that is killed leaves both: the name of the temporary
one ends in ``.partial``, and it can be removed.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def atomic_file(path: str | Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """The path to write to inside the ``with`` block; afterwards the file stands at ``path``.

    Args:
        path: the file to write or replace; its folder exists.
        durable: wait until the content is on the disk before the file takes its name.
        shared: several processes may write this file at the same time.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    writer = f".{uuid4().hex}" if shared else ""
    scratch = path.with_name(f"{path.name}{writer}.partial")
    try:
        yield scratch
        if durable:
            with scratch.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise


def atomic_write_text(path: str | Path, text: str, *, shared: bool = False) -> None:
    """``Path.write_text`` in UTF-8, whole or not at all; the arguments are ``atomic_file``'s."""
    with atomic_file(path, shared=shared) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """The folder to fill inside the ``with`` block; afterwards it stands at ``folder``.

    Args:
        folder: an absent or empty folder; folders above it are made where they are missing.

    Raises:
        OSError: the folder cannot be written, or something stands there already.
    """
    folder = Path(folder)
    scratch = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
