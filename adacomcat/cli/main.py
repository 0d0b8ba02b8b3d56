"""The command line: parses flags and the YAML file, runs the command, gives the exit code.

Exit codes: 0 done, 1 a bug or a failure of the machine, 2 wrong use or bad input, 3 a gate failed,
128 + a signal's number: stopped by it (130 is Ctrl-C).
"""

import argparse
import contextlib
import errno
import importlib
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from adacomcat.cli.arguments import EXCLUSIVE, REQUIRED, build_parser
from adacomcat.cli.config_file import flag, flags_of
from adacomcat.cli.output import reader_may_leave, tolerate_encodings
from adacomcat.errors import UserError
from adacomcat.utils.launch import is_first
from adacomcat.utils.stopping import Stopped
from adacomcat.utils.text import to_json
from adacomcat.utils.watch import Lost, say, tell

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
FULL = (errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors go to stderr.

    Args:
        argv: the words after the program's name; None: those of this process.
    """
    tolerate_encodings()
    try:
        args = parse(sys.argv[1:] if argv is None else list(argv))
        with _told_on_stderr(), _full_disks_named():
            return _run(args)
    except UserError as error:
        message = " ".join(str(error).split())
        tell(f"adacomcat: error: {message}")
        return WRONG_USE
    except Lost as lost:
        tell(f"adacomcat: {lost}")
        return FAILED
    except Stopped as stopped:
        if is_first():
            words = sys.argv[1:] if argv is None else list(argv)
            say(f"adacomcat: {stopped}; go on with: {_resuming(words)}")
        return stopped.exit_code
    except KeyboardInterrupt:
        if is_first():
            print("adacomcat: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except Exception:
        tell(traceback.format_exc().rstrip())
        return FAILED


@contextlib.contextmanager
def _full_disks_named() -> Iterator[None]:
    """Inside, a disk without room is a UserError, whatever was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = f" at {error.filename}" if error.filename else ""
        raise UserError(f"{error.strerror}{place}; make room and run the same again, training "
                        "with --resume") from error


def _resuming(words: Sequence[str]) -> str:
    """The command line that goes on with a run that was stopped."""
    if "WORLD_SIZE" in os.environ:
        return "the same launcher and command, with --resume"
    return shlex.join(["adacomcat", *words, *([] if "--resume" in words else ["--resume"])])


class _Stderr(logging.Handler):
    """Prints to what stderr is at that moment: a live view puts lines above its bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            with contextlib.suppress(OSError):
                print(self.format(record), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _told_on_stderr() -> Iterator[None]:
    """Inside, messages of the package's logger go to stderr: one line for each epoch."""
    logger, handler = logging.getLogger("adacomcat"), _Stderr()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments: the command line's flags, else those of ``-c FILE.yaml``, else the defaults.

    Raises:
        UserError: a flag is unknown, wrong or missing, or two exclude each other.
    """
    parser = build_parser()
    args, words = parser.parse_args(argv), argv
    if args.command is None:
        return args
    if args.config is not None:
        at = argv.index(args.command) + 1
        given = {word.split("=")[0] for word in argv[at:]}
        budget = [name for name in EXCLUSIVE if flag(name) in given]  # replaces the file's
        words = argv[:at] + flags_of(args, EXCLUSIVE, budget) + argv[at:]
        args = parser.parse_args(words)
    # With the flags of the file, so that whoever reads it can run it again.
    args.invocation = shlex.join(["adacomcat", *words])
    for name in REQUIRED[args.command]:
        if getattr(args, name) is None:
            raise UserError(f"{args.command} needs {flag(name)} "
                            f"(see adacomcat {args.command} --help)")
    chosen = [flag(name) for name in EXCLUSIVE if getattr(args, name, None) is not None]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} exclude each other; say one of them")
    return args


def _run(args: argparse.Namespace) -> int:
    """Run the command and show its outcome; the exit code."""
    if args.version:
        import adacomcat
        print(f"adacomcat {adacomcat.__version__}")
        return 0
    if args.command is None:
        build_parser().print_help()
        return WRONG_USE
    command = importlib.import_module(f"adacomcat.cli.commands.{args.command.replace('-', '_')}")
    with _one_line_warnings(), _stdout_for_json(args.json), _preferring(args):
        outcome = command.run(args)
    if is_first():
        text = to_json(outcome.data) if args.json else None
        with reader_may_leave():
            print(text) if text is not None else outcome.show()
    return outcome.code


def _preferring(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Inside, ops run on --backend where they can."""
    if getattr(args, "backend", None) is None:
        return contextlib.nullcontext()
    from adacomcat.ops import backends
    return backends.prefer_backend(args.backend)


@contextlib.contextmanager
def _stdout_for_json(wanted: bool) -> Iterator[None]:
    """Inside, prints of libraries go to stderr where JSON is ``wanted``, which is all of stdout."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Inside, warnings for users are one line on stderr; those for programmers are left out."""
    def show(message: Warning | str, category: type[Warning], *rest: object) -> None:
        if is_first() and issubclass(category, UserWarning | RuntimeWarning):
            print(f"adacomcat: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
