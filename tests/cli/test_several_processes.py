"""Several processes of one run: one line names whoever is lost, and nobody waits for ever."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_line import GRAY, QUICK

TRAIN = ["train", *GRAY, *QUICK, "--dense", "--epochs", "5000", "--no-report", "--device", "cpu"]


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Two processes, in the midst of training."""
    command = [sys.executable, "-m", "adacomcat.cli.torchrun", "--standalone",
               "--nproc-per-node=2", *TRAIN, "--output", tmp_path / "out", "--timeout", "5"]
    child = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert child.stderr is not None
    assert any(line.startswith("epoch 2 of") for line in child.stderr)
    yield child
    child.kill()


def process_of(launcher: subprocess.Popen, rank: int) -> int:
    """The id of the launcher's child of this rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(children)


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGSTOP), (1, signal.SIGKILL)])
def test_a_lost_process_is_named(rank: int, number: signal.Signals,
                                 launched: subprocess.Popen) -> None:
    os.kill(process_of(launched, rank), number)
    _, err = launched.communicate(timeout=120)
    assert launched.returncode == 1 and "Traceback" not in err, err
    last = err.splitlines()[-1]
    assert last.startswith(f"adacomcat: rank {rank} of 2 on {socket.gethostname()} ended or fell "
                           "silent, last seen at epoch "), err
    assert err.count("adacomcat: ") == 1, err


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "adacomcat.cli.torchrun", "--standalone",
                           "--nproc-per-node=2", *map(str, words)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("flags", "says"), [
    (["--lr", "-1"], "--lr"), (["--batch-size", "4999"], "larger than the training set"),
    (["--batch-size", "1"], "without an image")])
def test_wrong_use_is_told_once(flags: list[str], says: str, tmp_path: Path) -> None:
    """Found before the processes meet, and after."""
    done = launch(*TRAIN, "--output", tmp_path / "out", *flags)
    assert done.returncode == 2 and done.stderr.count("error:") == 1, done.stderr
    assert says in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_two_processes_without_torchrun_that_never_meet(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run([sys.executable, "-m", "adacomcat", *map(str, TRAIN), "--output",
                           tmp_path / "out", "--timeout", "2"], capture_output=True, text=True,
                          env=os.environ | alone | {"OMP_NUM_THREADS": "1"})
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert lines[-1].startswith("adacomcat: not all 2 processes of the run met within 2 s")
