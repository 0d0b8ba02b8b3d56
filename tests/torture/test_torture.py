"""Training on bad days: killed at any moment, on full disks, and when the power goes.

Whatever happens, a run that is started once more ends as the one that nothing happened to, byte by
byte. TORTURE_KILLS is the number of kills of each test, TORTURE_SEED decides when they come;
`make torture` takes 100. Every change of a file is a place to die at, beside random moments.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import bad_disk
from helpers.bad_disk import FULL, KILL, Trouble
from helpers.command_line import GRAY
from helpers.forks import Forks

from adacomcat.distill.state import FILE, has_state, load_state

KILLS = int(os.environ.get("TORTURE_KILLS", "1"))
SEED = int(os.environ.get("TORTURE_SEED", "0"))
SIGNALS = {"KILL": [signal.SIGKILL], "TERM": [signal.SIGTERM], "INT": [signal.SIGINT],
           "INT twice": [signal.SIGINT, signal.SIGINT]}
QUICK = ["--data", "digits", "-b", "256", "--calibration-images", "32", "--search-steps", "3",
         "--device", "cpu", "--checkpoint-seconds", "0.3", "--lr", "2e-3"]
VARIANTS = {
    "dense": ["--dense", "--epochs", "3", "--model-ema", "--opt", "sgd"],
    "search": ["--keep-params", "0.5", "--epochs", "2", "--search", "every", "--mixup", "0.2"],
    "refined": ["--keep-params", "0.6", "--epochs", "1", "--finetune-epochs", "1", "--refine", "2",
                "--align", "manifold", "--gauge"],
}

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(bad_disk.build(tmp_path_factory.mktemp("library"))) as server:
        yield server


class Run:
    """One training run that is started as often as it takes; all it writes lies in ``folder``."""

    def __init__(self, forks: Forks, variant: str, place: Path) -> None:
        self.forks, self.folder = forks, place / "disk"
        self.stderr, self.platter = place / "stderr", place / "platter"
        self.folder.mkdir()
        self.words = ["train", *GRAY, *QUICK, *VARIANTS[variant], "--output", self.folder / "out",
                      "--resume"]

    def start(self, at: int = 0, mode: int = KILL, log: Path | None = None) -> int:
        shutil.rmtree(self.platter, ignore_errors=True)
        self.platter.mkdir()
        trouble = Trouble(str(self.folder), at, mode, None if log is None else str(log),
                          str(self.platter))
        return self.forks.start(self.words, self.stderr, trouble)

    def run(self, **trouble: int) -> int:
        self.start(**trouble)
        return self.forks.wait()

    def finish(self) -> dict[str, bytes]:
        """Start once more, without trouble; what stands in the end."""
        assert self.run() == 0, self.stderr.read_text()
        # A kill while `require_writable` tries a name leaves an empty folder, which stays.
        left = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*")
                      if not (path.name.endswith(".partial") and path.is_dir()
                              and not list(path.iterdir())))
        assert left == ["out", "out/config.json", "out/model.safetensors", "out/report.html",
                        "out/run.json"]
        return {name: (self.folder / "out" / name).read_bytes()
                for name in ("config.json", "model.safetensors")}

    def position(self) -> tuple[int, int, int]:
        """How far the state is: epochs, steps, steps of a search."""
        state = self.folder / "out.state"
        if not has_state(state):
            return (9, 0, 0) if (self.folder / "out").is_dir() else (0, 0, 0)
        found = load_state(state)
        begun = (found["search"] or {}).get("begun")
        return found["epoch"], found["step"], len(begun["losses"]) if begun else 0


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory):
    """variant → (what stands in the end, its changes, its seconds) where nothing happens."""
    known = {}

    def of(variant: str) -> tuple[dict[str, bytes], list[str], float]:
        if variant not in known:
            run = Run(forks, variant, tmp_path_factory.mktemp("whole"))
            log = run.folder.parent / "log"
            run.start(log=log)
            begin = time.monotonic()
            assert forks.wait() == 0, run.stderr.read_text()
            seconds = time.monotonic() - begin
            files = {name: (run.folder / "out" / name).read_bytes()
                     for name in ("config.json", "model.safetensors")}
            known[variant] = files, log.read_text().splitlines(), seconds
        return known[variant]
    return of


def with_variants(others: Iterable[Any]) -> list[tuple]:
    """All pairs with the variants; in the slice each of the others with one of them, in turn."""
    if KILLS > 1:
        return list(itertools.product(others, VARIANTS))
    return list(zip(others, itertools.cycle(VARIANTS)))


# `make torture` takes all; its slice the variant that writes ranks and their search, too.
SAVING = list(VARIANTS) if KILLS > 1 else ["search"]


@pytest.mark.parametrize(("name", "variant"), with_variants(SIGNALS))
def test_killed_at_random_times(name: str, variant: str, forks: Forks, whole, tmp_path: Path
                                ) -> None:
    expected, _, seconds = whole(variant)
    draw, kills = random.Random(f"{SEED} {name} {variant}"), 0
    for number in itertools.count():
        (tmp_path / str(number)).mkdir()
        run, ended, before = Run(forks, variant, tmp_path / str(number)), False, (0, 0, 0)
        while not ended and kills < KILLS:
            process = run.start()
            for each in SIGNALS[name]:
                time.sleep(draw.uniform(0, seconds if each == SIGNALS[name][0] else 0.02))
                try:
                    os.kill(process, each)
                except ProcessLookupError:
                    break
            code = forks.wait()
            ended = code == 0
            kills += not ended
            # -2 and -15: before the command heeds signals, or behind its end
            assert code in (0, -9, -2, -15, 143, 130), run.stderr.read_text()
            after = run.position()
            assert ended or after >= before
            before = after
        assert run.finish() == expected
        if kills >= KILLS:
            return


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """What stands in the end where nothing happens to two processes, and their seconds."""
    folder = tmp_path_factory.mktemp("two") / "out"
    begin = time.monotonic()
    assert two(folder).wait() == 0
    return made_by_two(folder), time.monotonic() - begin


@pytest.mark.parametrize("name", SIGNALS if KILLS > 1 else ["KILL"])
def test_two_processes_killed_at_random_times(name: str, tmp_path: Path,
                                              whole_of_two: tuple[dict[str, bytes], float]) -> None:
    """SIGKILL ends one of the processes, or the launcher and both; the launcher gets the others."""
    expected, seconds = whole_of_two
    draw = random.Random(f"{SEED} {name} two")
    for _ in range(max(1, KILLS // 25)):
        launcher = two(tmp_path / "out")
        time.sleep(draw.uniform(0.3 * seconds, seconds))
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        victims = [int(draw.choice(children))] if children and draw.random() < 0.5 else [
            launcher.pid, *map(int, children)]
        for number in SIGNALS[name]:
            for victim in victims if name == "KILL" else [launcher.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, number)
        assert launcher.wait(timeout=120) in (0, 1, -9, -2, -15, 130, 143)
    assert two(tmp_path / "out").wait() == 0
    assert made_by_two(tmp_path / "out") == expected


def two(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "adacomcat.cli.torchrun", "--standalone",
               "--nproc-per-node=2", "train", *GRAY, *QUICK, *VARIANTS["search"], "--timeout",
               "30", "--resume", "--output", folder]
    return subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def made_by_two(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.name not in ("report.html", "run.json")}


def places(variant: str, whole, draw: random.Random) -> list[int]:
    """Numbers of changes: each kind of change of each file, then others at random."""
    changes = whole(variant)[1]
    kinds = {}
    for number, change in enumerate(changes, 1):
        kind, _, path = change.partition(" ")
        parts = [part.split(".")[1] if part.endswith(".partial") else part
                 for part in path.split("/")]
        kinds.setdefault((kind, *parts), []).append(number)
    named = [draw.choice(numbers) for numbers in kinds.values()]
    draw.shuffle(named)
    others = draw.sample(range(1, len(changes) + 1), len(changes))
    return list(dict.fromkeys([*named, *others]))[:KILLS]


@pytest.mark.parametrize("variant", SAVING)
def test_killed_at_every_place_in_saving(variant: str, forks: Forks, whole, tmp_path: Path) -> None:
    expected = whole(variant)[0]
    for number in places(variant, whole, random.Random(f"{SEED} places {variant}")):
        (tmp_path / str(number)).mkdir()
        run = Run(forks, variant, tmp_path / str(number))
        assert run.run(at=number) in (-9, 0), run.stderr.read_text()
        assert run.finish() == expected, number


@pytest.mark.parametrize("variant", SAVING)
def test_a_full_disk_at_any_change(variant: str, forks: Forks, whole, tmp_path: Path) -> None:
    expected = whole(variant)[0]
    for number in places(variant, whole, random.Random(f"{SEED} full {variant}")):
        (tmp_path / str(number)).mkdir()
        run = Run(forks, variant, tmp_path / str(number))
        code = run.run(at=number, mode=FULL)
        lines = [line for line in run.stderr.read_text().splitlines() if "error" in line]
        assert code == 0 or (code == 2 and len(lines) == 1 and "o space left" in lines[0]), (
            number, run.stderr.read_text())
        assert not list(run.folder.rglob("*.partial"))
        state = run.folder / "out.state"
        assert not (state / FILE).exists() or load_state(state)
        assert run.finish() == expected, number


@pytest.mark.parametrize(("kept", "variant"),
                         with_variants([(False, 0.0), (True, 0.0), (True, 0.5)]))
def test_power_that_goes_at_any_change(kept: tuple[bool, float], variant: str, forks: Forks,
                                       whole, tmp_path: Path) -> None:
    """What was not synced is lost: its names, its contents, or both."""
    names, contents = kept
    expected, changes, _ = whole(variant)
    draw = random.Random(f"{SEED} power {variant} {names} {contents}")
    for number in [*places(variant, whole, draw), len(changes) + 1]:
        (tmp_path / str(number)).mkdir()
        run = Run(forks, variant, tmp_path / str(number))
        code = run.run(at=number)
        assert code in (-9, 0), run.stderr.read_text()
        bad_disk.cut_power(run.folder, run.platter, names=names, contents=contents, draw=draw)
        assert code == -9 or (run.folder / "out" / "model.safetensors").exists()
        assert run.finish() == expected, number
