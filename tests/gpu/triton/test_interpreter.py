"""Every kernel's source, forward and backward, on ragged shapes in a strict interpreter.

The tests check errors against float64, that every element of an output is written, that no lane
leaves its tensor, and that no program touches an element that another program stores.
"""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from interpreted import CASES, types_of

PROCESSES = 2
HERE = Path(__file__).parent
# The processes import the kernels, and the helpers in tests/gpu.
ROOT = HERE.parents[2]
IMPORTS = os.pathsep.join([str(HERE.parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
KERNELS = ROOT / "kernels"


def start(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": IMPORTS, "TRITON_INTERPRET": "1",
                   "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def interpret() -> dict[str, list[str]]:
    processes = [start("interpret.py", str(i), str(PROCESSES)) for i in range(PROCESSES)]
    found = {}
    for process in processes:
        out, error = process.communicate()
        assert process.returncode == 0, error
        found |= json.loads(out)
    return found


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The findings of one run, which all pytest-xdist workers share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers
    path = folder / "interpreted.json"
    with (folder / "interpreted.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_text(json.dumps(interpret()))
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", [
    f"{case.id}-{dtype}-{architecture}" for number, case in enumerate(CASES)
    for dtype, architecture in types_of(number) if architecture == "sm_80"])
def test_interpreted(name: str, findings: dict[str, list[str]]) -> None:
    assert findings[name] == []


def test_interpreted_as_on_amd(findings: dict[str, list[str]]) -> None:
    found = {name: complaints for name, complaints in findings.items() if "gfx942" in name}
    assert len(found) >= 12 and not any(found.values()), found


def test_every_kernel_ran_at_ten_shapes(findings: dict[str, list[str]]) -> None:
    source = "".join(file.read_text() for file in KERNELS.glob("*.py"))
    for kernel in re.findall(r"^def (\w+_kernel)\(", source, re.M):
        shapes = [case for i in range(PROCESSES) for case in findings.get(f"{kernel} {i}", [])]
        assert len(shapes) >= 10, kernel


@pytest.fixture(scope="module")
def caught() -> dict[str, str]:
    process = start("faulty_kernels.py")
    out, error = process.communicate()
    assert process.returncode == 0, error
    return json.loads(out)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("reads_past_the_end", "out of bounds"),
        ("reads_before_the_start", "out of bounds"),
        ("programs_overlap", "race: a store"),
        ("reads_a_neighbour", "race: a "),
        ("reads_between_rows", "gap"),
        ("lanes_collide", "two lanes"),
        ("leaves_a_hole", "not written"),
        ("product_too_small", "K >= 16"),
        ("none", ""),
    ],
)
def test_the_interpreter_finds(fault: str, message: str, caught: dict[str, str]) -> None:
    assert message in caught[fault] and bool(caught[fault]) == bool(message)


def test_bfloat16_is_rounded_as_torch_rounds(caught: dict[str, str]) -> None:
    assert caught["bfloat16"] == ""
