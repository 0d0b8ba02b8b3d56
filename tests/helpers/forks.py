"""Commands of ours in processes of their own, forked from one that has imported everything."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from helpers.bad_disk import Trouble

LIBRARIES = ("sklearn.datasets", "sklearn.model_selection", "matplotlib.pyplot", "jinja2", "timm",
             "adacomcat.cli.commands.train", "adacomcat.convert.sequential", "torch._dynamo")


class Forks:
    """Runs one command at a time.

    Args:
        library: of ``bad_disk.build``, which every process loads.
    """

    def __init__(self, library: Path) -> None:
        env = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen([sys.executable, "-m", "helpers.forks"], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env=env, cwd=Path(__file__).parents[1])

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()

    def start(self, words: Sequence[object], stderr: Path, trouble: Trouble | None = None) -> int:
        """Begin a command; the id of its process."""
        assert self.server.stdin is not None
        request = {"words": [str(word) for word in words], "stderr": str(stderr),
                   "trouble": trouble}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return self._reply()

    def wait(self) -> int:
        """The exit code of the command, negative where a signal ended it."""
        return self._reply()

    def _reply(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())


def serve() -> int:
    """Fork a process for each line of stdin. In that process: the exit code of its command."""
    for name in LIBRARIES:
        __import__(name)
    replies = os.dup(1)  # stdout belongs to the commands
    for line in sys.stdin:
        process = os.fork()
        if not process:
            return child(json.loads(line))
        os.write(replies, f"{process}\n".encode())
        _, status = os.waitpid(process, 0)
        os.write(replies, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return 0


def child(request: dict) -> int:
    from adacomcat import cli
    stderr = os.open(request["stderr"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.dup2(stderr, 1), os.dup2(stderr, 2)
    ctypes.CDLL(None).prctl(1, 9)  # ends with the server
    if request["trouble"] is not None:
        Trouble(*request["trouble"]).arm()
    return cli.main(request["words"])


if __name__ == "__main__":
    sys.exit(serve())
