"""Who of the processes of a run died or stands still, and the one line that all of them end with.

Each process writes a beat into the store that they share, about once a second: how far it came, and
whether it waits for the others. A process that waits too long, or whose connections break, reads
the beats of all. It blames those whose beats stopped, else those that nobody can be waiting for.

``utils.distributed`` starts a watch; the command line prints through ``tell``. This module does not
import torch.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from adacomcat.errors import UserError
from adacomcat.utils.launch import Launch, launch
from adacomcat.utils.stopping import asked_to_stop

if TYPE_CHECKING:
    from torch.distributed import Store

LAST_LINE = "ADACOMCAT_LAST_LINE"  # of a launcher that prints the content of this file when it ends
_VERDICT = "adacomcat/verdict"
_LOOKS = 4  # beats of all, one a second, that tell who has stopped
_FAILED = 1  # the exit code
_STORE_PATIENCE = timedelta(seconds=10)
_SLOWEST_FIRST_ERROR = 2.0  # seconds after which the first process has told what concerns all

_watches: list["Watch"] = []  # the one of this process, or nothing


class Lost(Exception):
    """Another process of this run died or stands still, so this one cannot go on."""


class Beat(NamedTuple):
    """What a process tells of itself."""

    count: int  # how many beats came before
    host: str
    where: str  # how far it came
    waits: bool  # for the others


class Watch:
    """Watches the other processes while this one waits for them.

    Args:
        store: what the processes share; nobody else uses this connection to it.
        rank: of this process.
        world_size: how many there are.
        timeout: seconds that this process waits for the others.
    """

    def __init__(self, store: "Store", rank: int, world_size: int, timeout: float) -> None:
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.pause = min(1.0, timeout / 20)  # seconds from beat to beat
        self.host, self.where = socket.gethostname(), "the start"
        self._count = 0
        self._since: float | None = None  # when this process began to wait for the others
        self._verdict: str | None = None
        self._looks: list[list[Beat]] = []
        # A connection broke: the main thread waits until the watching one knows why.
        self._broken, self._explained = threading.Event(), threading.Event()
        self._ended = threading.Event()
        store.set_timeout(_STORE_PATIENCE)
        self._beat()
        _watches[:] = [self]
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def reached(self, where: str) -> None:
        """Tell how far this process came."""
        self.where = where

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever ends only when the other processes take part.

        Raises:
            Lost: another process died.
        """
        self._since = time.monotonic()
        try:
            yield
        except RuntimeError as error:  # so torch tells that a connection broke, among other things
            self._broken.set()
            self._explained.wait()
            if self._verdict is not None:
                raise Lost(self._verdict.removeprefix("adacomcat: ")) from error
            raise
        finally:
            self._since = None

    def end(self) -> None:
        """Watch no longer, and leave the store alone."""
        self._ended.set()
        self._thread.join(_STORE_PATIENCE.total_seconds())
        _watches.clear()

    def conclude(self, line: str) -> str:
        """Decide what the whole run ends with: ``line``, or what another process said before.

        The line is printed once on each host.
        """
        if self._verdict is not None:
            return self._verdict
        if self.rank:  # the first process speaks first where all have the same to say
            time.sleep(self.pause)
        try:
            line = self.store.compare_set(_VERDICT, "", line).decode()
            first = self.store.add(f"adacomcat/said on {self.host}", 1) == 1
        except RuntimeError:  # the store is gone with its host
            first = True
        self._verdict = line
        if first:
            say(line)
        return line

    def _run(self) -> None:
        while not self._ended.wait(self.pause):
            verdict = None
            try:
                self._beat()
                verdict = self._look()
            except RuntimeError as error:
                if self._suspicious():
                    verdict = f"lost the host of the run's store, {_store_host()} ({error})"
            if verdict is None:
                continue
            self.conclude(f"adacomcat: {verdict}")
            if not self._broken.is_set():
                os._exit(_FAILED)  # the main thread waits for what never comes
            self._explained.set()
            return

    def _beat(self) -> None:
        beat = Beat(self._count, self.host, self.where, self._since is not None)
        self.store.set(f"adacomcat/{self.rank}", json.dumps(beat))
        self._count += 1

    def _waited(self) -> float:
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _suspicious(self) -> bool:
        late = self.timeout - (_LOOKS + 1) * self.pause
        asked = asked_to_stop() is not None and self._waited() > 10 * self.pause
        return self._broken.is_set() or asked or self._waited() > late

    def _look(self) -> str | None:
        """What ends the run; None where nothing does, or not yet."""
        if not self._suspicious():
            self._looks.clear()
            return None
        if self.store.check([_VERDICT]):
            return self.store.get(_VERDICT).decode().removeprefix("adacomcat: ")
        self._looks.append([Beat(*json.loads(self.store.get(f"adacomcat/{rank}")))
                            for rank in range(self.world_size)])
        if len(self._looks) < _LOOKS:
            return None
        first, last = self._looks.pop(0), self._looks[-1]
        silent = [rank for rank in range(self.world_size) if first[rank].count == last[rank].count]
        working = [rank for rank in range(self.world_size) if not last[rank].waits]
        if silent:
            return self._blame(silent, last, "ended or fell silent")
        if working and self._waited() > self.timeout - 2 * self.pause:
            return self._blame(working, last,
                               f"kept the others waiting for {self.timeout:g} s (--timeout)")
        if self._broken.is_set():  # nobody is lost: the error is what it says
            self._explained.set()
            self._broken.clear()
        return None

    def _blame(self, ranks: list[int], beats: list[Beat], what: str) -> str:
        found = beats[ranks[0]]
        more = f", and {len(ranks) - 1} more" if len(ranks) > 1 else ""
        return (f"rank {ranks[0]} of {self.world_size} on {found.host}{more} {what}, last seen at "
                f"{found.where}; start again, training with --resume")


def current_watch() -> Watch | None:
    """The watch of this process, if it is one of several."""
    return _watches[0] if _watches else None


def tell(message: str) -> None:
    """Print ``message`` on stderr; processes that have the same to say print it once.

    A process other than the first one is named, and speaks only where the first one does not.
    """
    place = Launch()
    with suppress(UserError):  # the environment is what the message is about
        place = launch()
    if place.rank:
        message = f"{message} (rank {place.rank} on {socket.gethostname()})"
    watch = current_watch()
    if watch is not None:
        watch.conclude(message)
        return
    if place.rank:  # a launcher ends this process while it sleeps, where the first one has ended
        time.sleep(_SLOWEST_FIRST_ERROR)
    say(message)


def say(line: str) -> None:
    """Print, or leave the printing to the launcher, which is the last one to speak.

    A run that the launcher starts once more prints itself.
    """
    path = os.environ.get(LAST_LINE)
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS")
    if path and os.environ.get("TORCHELASTIC_RESTART_COUNT") == restarts:
        with suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(line)
        return
    print(line, file=sys.stderr, flush=True)


def _store_host() -> str:
    return os.environ.get("MASTER_ADDR", "unknown")
