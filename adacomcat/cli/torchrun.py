"""``adacomcat-torchrun``: torchrun for our commands, ending with one line and no traceback.

    adacomcat-torchrun --nproc-per-node=8 train -c deit_small.yaml -o runs/deit_small

The flags before the command are those of torchrun. The exit code is that of the process that failed
first, 1 where a signal ended it, and 128 + a signal's number where that one stopped the launcher.
SIGUSR1 stops it as SIGTERM does: the processes save their state and end.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from adacomcat.utils.watch import LAST_LINE

FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes, wait for them, and print the line that they ended with, if any.

    Args:
        argv: torchrun's flags, then a command of ours with its flags; None: those of this process.
    """
    args = run.parse_args(sys.argv[1:] if argv is None else list(argv))
    command = [args.training_script, *args.training_script_args]
    args.module, args.training_script, args.training_script_args = True, "adacomcat", command
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: _stop(number, asked))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last_line"
        os.environ[LAST_LINE] = str(path)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings have stacks of C++
        try:
            run.run(args)
            return 0
        except ChildFailedError as error:
            code, line = _first_failure(error)
        except SignalException as error:
            found = signal.Signals([*asked, error.sigval][0])
            code, line = 128 + found, f"the launcher was stopped by {found.name}"
        except RendezvousError as error:
            code, line = FAILED, f"the machines of the run did not meet: {error}"
        told = path.read_text(encoding="utf-8") if path.is_file() else ""
    if told or line:
        print(told or f"adacomcat: {line}", file=sys.stderr)
    return code


def _stop(number: int, asked: list[int]) -> None:
    """torchrun passes SIGTERM on to the processes, and no other signal that clusters send."""
    asked.append(number)
    os.kill(os.getpid(), signal.SIGTERM)


def _first_failure(error: ChildFailedError) -> tuple[int, str]:
    """(exit code, what is to say of a process that could not speak for itself)"""
    rank, failure = error.get_first_failure()
    if failure.exitcode > 0:
        return failure.exitcode, ""
    name = signal.Signals(-failure.exitcode).name
    return FAILED, (f"rank {rank} on {socket.gethostname()} (process {failure.pid}) was ended by "
                    f"{name}; start again, training with --resume")


if __name__ == "__main__":
    sys.exit(main())
