"""Several processes of one run, forked from one that has imported everything.

``torchrun`` starts each of them anew, which takes longer than what the tests do in them. How it
starts and watches them is tested in cli/test_several_processes.py.
"""

import contextlib
import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from torch.distributed import TCPStore

from adacomcat import cli

SERVER = multiprocessing.get_context("forkserver")
# What takes long to import, once for all processes.
SERVER.set_forkserver_preload([
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "sklearn.datasets",
    "sklearn.model_selection", "adacomcat.cli.commands.train", "adacomcat.cli.commands.evaluate"])


class Ended(NamedTuple):
    """A command of the first process."""

    returncode: int
    stdout: str
    stderr: str


def together(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function``, of a module of helpers, gives in each of ``count`` processes."""
    # As torchrun's: the launcher owns the store, and the port is whichever is free.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, replies = [], []
    for rank in range(count):
        ours, theirs = SERVER.Pipe()
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "OMP_NUM_THREADS": 1,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
                 "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        processes.append(SERVER.Process(target=_child, args=(theirs, place, function, arguments)))
        processes[-1].start()
        theirs.close()
        replies.append(ours)
    found = [_received(reply) for reply in replies]
    for process in processes:
        process.join()
    faults = [text for fault, text in found if fault]
    assert not faults, "\n".join(faults)
    return [value for _, value in found]


def one(function: Callable[..., Any], *arguments: Any) -> int:
    """The exit code of a process that calls ``function``, of a module of helpers, alone."""
    process = SERVER.Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def command_on(count: int, *argv: object) -> Ended:
    """A command of ours on ``count`` processes."""
    found = together(count, _command, [str(word) for word in argv])
    assert all(each.returncode == found[0].returncode for each in found), found
    return found[0]


def _command(argv: list[str]) -> Ended:
    with (contextlib.redirect_stdout(io.StringIO()) as out,
          contextlib.redirect_stderr(io.StringIO()) as err):
        code = cli.main(argv)
    return Ended(code, out.getvalue(), err.getvalue())


def _child(reply: Connection, place: dict[str, object], function: Callable[..., Any],
           arguments: tuple[Any, ...]) -> None:
    os.environ |= {name: str(value) for name, value in place.items()}
    try:
        reply.send((False, function(*arguments)))
    except BaseException:
        reply.send((True, f"rank {place['RANK']}: {traceback.format_exc()}"))


def _received(reply: Connection) -> tuple[bool, Any]:
    try:
        return reply.recv()
    except EOFError:
        return True, "a process ended without a word"
