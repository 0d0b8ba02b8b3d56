"""The command line: parses flags and the YAML file, runs the command, gives the exit code.

Exit codes: 0 done, 1 a bug or a failure of the machine, 2 wrong use or bad input, 3 a gate failed,
128 + a signal's number: stopped by it (130 is Ctrl-C).
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from adacomcat.cli.arguments import EXCLUSIVE, REQUIRED, build_parser
from adacomcat.errors import UserError
from adacomcat.utils.stopping import Stopped

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors go to stderr.

    Args:
        argv: the words after the program's name; None: those of this process.
    """
    try:
        args = parse(sys.argv[1:] if argv is None else list(argv))
        with _told_on_stderr():
            return _run(args)
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"adacomcat: error: {message}", file=sys.stderr)
        return WRONG_USE
    except Stopped as stopped:
        if first_process():
            words = sys.argv[1:] if argv is None else list(argv)
            print(f"adacomcat: {stopped}; go on with: {_resuming(words)}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("adacomcat: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except Exception:
        traceback.print_exc()
        return FAILED


def _resuming(words: Sequence[str]) -> str:
    """The command line that goes on with a run that was stopped."""
    if "WORLD_SIZE" in os.environ:
        return "the same launcher and command, with --resume"
    return shlex.join(["adacomcat", *words, *([] if "--resume" in words else ["--resume"])])


@contextlib.contextmanager
def _told_on_stderr() -> Iterator[None]:
    """Inside, messages of the package's logger go to stderr: one line for each epoch."""
    logger, handler = logging.getLogger("adacomcat"), logging.StreamHandler(sys.stderr)
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
    args = parser.parse_args(argv)
    if args.command is None:
        return args
    if args.config is not None:
        at = argv.index(args.command) + 1
        given = [word.split("=")[0] for word in argv[at:]]
        args = parser.parse_args(argv[:at] + _yaml_flags(args, given) + argv[at:])
    for name in REQUIRED[args.command]:
        if getattr(args, name) is None:
            raise UserError(f"{args.command} needs {_flag(name)} "
                            f"(see adacomcat {args.command} --help)")
    chosen = [_flag(name) for name in EXCLUSIVE if getattr(args, name, None) is not None]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} exclude each other; say one of them")
    return args


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _yaml_flags(args: argparse.Namespace, given: list[str]) -> list[str]:
    """The file's entries as words of a command line, so that the parser checks both alike.

    A budget on the command line replaces the one in the file. ``given``: the flags of the command
    line.
    """
    known = vars(args).keys() - {"command", "config", "version"}
    entries = {str(key).replace("-", "_"): value for key, value in _read_yaml(args.config).items()}
    unknown = sorted(entries.keys() - known)
    if unknown:
        raise UserError(f"{args.config}: {args.command} has no {', '.join(map(_flag, unknown))}")
    budget_given = any(_flag(name) in given for name in EXCLUSIVE)
    words: list[str] = []
    for name, value in entries.items():
        if value is None or (budget_given and name in EXCLUSIVE):
            continue
        if isinstance(getattr(args, name), bool) != isinstance(value, bool):
            raise UserError(f"{args.config}: {name}: {value!r} is no value of {_flag(name)}")
        words += _words(_flag(name), value)
    return words


def _words(flag: str, value: object) -> list[str]:
    """A flag and its value from YAML as words of a command line."""
    if isinstance(value, bool):
        return [flag] * value
    if isinstance(value, dict):
        return [flag, *(f"{key}={item}" for key, item in value.items())]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml
    try:
        with open(path) as file:
            entries = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(entries or {}, dict):
        raise UserError(f"{path}: 'flag: value' lines are expected")
    return entries or {}


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
    with _one_line_warnings(), _stdout_for_json(args.json):
        outcome = command.run(args)
    if not first_process():
        return outcome.code
    if args.json:
        print(json.dumps(outcome.data))
    else:
        outcome.show()
    sys.stdout.flush()
    return outcome.code


def first_process() -> bool:
    """Whether this process prints and writes: under torchrun only the first does."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _stdout_for_json(wanted: bool) -> Iterator[None]:
    """Inside, prints of libraries go to stderr where JSON is ``wanted``, which is all of stdout."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Inside, warnings for users are one line on stderr; those for programmers are left out."""
    def show(message: Warning | str, category: type[Warning], *rest: object) -> None:
        if first_process() and issubclass(category, UserWarning | RuntimeWarning):
            print(f"adacomcat: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
