"""The Slurm script of the recipe, dry: with stand-ins for Slurm's programs and for the launcher."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from adacomcat.cli.main import parse

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/imagenet/train.slurm"
PROGRAMS = {
    "scontrol": 'case "$1" in show) printf "node1\\nnode2\\n";; *) echo "$@" >> "$CALLS";; esac',
    "srun": 'shift; exec "$@"',  # after --kill-on-bad-exit=1
    "adacomcat-torchrun": 'printf "%s\\n" "$@" > "$WORDS"; exit "$CODE"',
}
SLURM = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
         "SLURM_JOB_ID": "77"}
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def submit(folder: Path, code: int) -> tuple[int, list[str], str]:
    """(exit code, the launcher's words, what scontrol was told) where the launcher exits so."""
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    calls, words = folder / "calls", folder / "words"
    calls.touch()
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "WORDS": str(words),
           "CODE": str(code)}
    done = subprocess.run(["bash", SCRIPT], cwd=ROOT, env=SLURM | env, capture_output=True)
    assert not done.stderr
    return done.returncode, words.read_text().splitlines(), calls.read_text().strip()


def test_the_launcher_gets_every_node_and_a_command_that_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, words, calls = submit(tmp_path, 0)
    assert (code, calls) == (0, "")
    at = words.index("train")
    assert words[:at] == ["--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d",
                          "--rdzv-endpoint=node1:29500", "--rdzv-id=77"]
    monkeypatch.chdir(ROOT)
    assert parse(words[at:]).resume


@pytest.mark.parametrize(("code", "calls"), [(138, "requeue 77"), (1, ""), (2, "")])
def test_only_a_run_that_was_stopped_in_time_goes_back_into_the_queue(code: int, calls: str,
                                                                      tmp_path: Path) -> None:
    found = submit(tmp_path, code)
    assert (found[0], found[2]) == (code, calls)


def test_the_job_of_kubernetes_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    service, job = yaml.safe_load_all((SCRIPT.parent / "kubernetes.yaml").read_text())
    words = job["spec"]["template"]["spec"]["containers"][0]["command"]
    name = service["metadata"]["name"]
    assert f"--rdzv-endpoint={name}-0.{job['spec']['template']['spec']['subdomain']}:29500" in words
    assert words[0] == "adacomcat-torchrun"
    monkeypatch.chdir(ROOT)
    assert parse(words[words.index("train"):]).resume
