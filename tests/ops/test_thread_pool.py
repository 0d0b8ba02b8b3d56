"""The pool of threads behind the CPU kernels: alone under ThreadSanitizer, and as ops use it."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from adacomcat import ops
from adacomcat.ops import backends

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "tests/helpers/thread_pool_stress.cpp",
           ROOT / "csrc/cpu/runtime/thread_pool.cpp", ROOT / "csrc/cpu/runtime/cores.cpp"]

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
has_kernels = pytest.mark.skipif(not backends.build_info(), reason="no C++ extension")


def stress(folder: Path, *flags: str) -> Path:
    program = folder / "stress"
    subprocess.run(["g++", "-std=c++20", "-O1", "-g", *flags, f"-I{ROOT / 'csrc'}",
                    *map(str, SOURCES), "-lpthread", "-o", str(program)], check=True)
    return program


@compiles
@pytest.mark.parametrize(("flags", "forks"), [
    # Sanitizers do not follow a process of several threads into a child.
    ([], 200), (["-fsanitize=address,undefined"], 0), (["-fsanitize=thread"], 0),
], ids=["plain", "address sanitizer", "thread sanitizer"])
def test_loops_of_several_callers(tmp_path, flags, forks):
    found = subprocess.run([str(stress(tmp_path, *flags)), "4000", "6", str(forks)],
                           capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr[-2000:]


@compiles
def test_a_busy_core_holds_nobody_up(tmp_path):
    """Several callers on one core, all of whose time another program wants."""
    program = stress(tmp_path)
    core = str(min(os.sched_getaffinity(0)))
    other = subprocess.Popen([sys.executable, "-c",
                              f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"])
    try:
        found = subprocess.run(["taskset", "-c", core, str(program), "100", "3", "5"],
                               capture_output=True, text=True, timeout=120, check=False)
    finally:
        other.kill()
        other.wait()
    assert found.returncode == 0, found.stderr[-2000:]


def run_python(program: str, **environment: str) -> str:
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                           timeout=120, env={**os.environ, **environment}, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout.strip()


@has_kernels
def test_no_more_threads_than_cores():
    program = """
import os, torch
from adacomcat import _C
torch.set_num_threads(64)
print(_C.cores()["threads"], len(os.sched_getaffinity(0)))
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import time; time.sleep(0.05)
print(_C.cores()["threads"])
"""
    threads, cores, pinned = map(int, run_python(program).split())
    assert 1 <= threads <= cores
    assert pinned == 1


@has_kernels
@pytest.mark.parametrize(("files", "quota"), [
    ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
    ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000",
      "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 0.5),
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 0),
    ({"proc/self/cgroup": "5:memory:/x\n3:cpu,cpuacct:/c",
      "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us": "300000",
      "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us": "100000"}, 3),
    ({"proc/self/cgroup": "3:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 0),
    ({"proc/self/cgroup": "nonsense\n:::\n0::", "sys/fs/cgroup/cpu.max": "what is this"}, 0),
    ({}, 0),
])
def test_quota_of_control_groups(tmp_path, files, quota):
    from adacomcat import _C

    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert _C.quota_cores(str(tmp_path)) == quota


@has_kernels
def test_callers_at_once_get_what_one_gets():
    torch.manual_seed(3)
    x, v, u = torch.randn(300, 96), torch.randn(96, 32), torch.randn(130, 32)
    q = torch.randn(96, 96)
    inputs = [torch.randn(2, 197, 96) for _ in range(6)]

    def call(tokens: torch.Tensor) -> list[torch.Tensor]:
        return [ops.low_rank_linear(x, v, u),
                ops.low_rank_attention(tokens, q, None, q, q, q, None, 3, 0.2),
                ops.low_rank_mlp(tokens, v, u, None, u, v, None, "gelu")]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [call(tokens) for tokens in inputs]
        wrong: list[int] = []

        def work(i: int) -> None:
            torch.set_num_threads(2)
            for _ in range(30):
                if not all(map(torch.equal, call(inputs[i]), expected[i])):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong
