"""A process forked from one that runs the C++ kernels runs them too, as it does plain PyTorch."""

import os
import subprocess
import sys

import pytest

from adacomcat.ops import backends

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

PRELUDE = """
import os, signal, threading, time
import numpy as np
import torch
from adacomcat import ops
from adacomcat.ops import backends
from adacomcat.ops.decompositions import batched_svd

torch.manual_seed(0)
x, a = torch.randn(600, 96), torch.randn(3, 128, 128)
v, u = torch.randn(96, 33), torch.randn(130, 33)

def calls():
    yield ops.low_rank_linear(x, v, u)
    yield ops.low_rank_linear(x[:2], v, u)
    yield ops.dense_mlp(x, v.t(), None, v, None, "gelu")
    yield ops.low_rank_attention(x[None], v.t(), None, v.t(), v.t(), v, None, 3, 0.5)
    yield from batched_svd(a)

def child_ends_well(body, seconds=30):
    pid = os.fork()
    if not pid:
        try:
            os._exit(not body())
        finally:
            os._exit(3)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False
"""

# Threads that pack weights all the time: without a handler some of the forks meet a locked mutex.
WHILE_THREADS_PACK = """
torch.set_num_threads(1)
stop = threading.Event()

def pack():
    while not stop.is_set():
        ops.low_rank_linear(x[:8], v.clone(), u.clone())

threads = [threading.Thread(target=pack) for _ in range(4)]
for thread in threads:
    thread.start()
def child():
    ops.low_rank_linear(x, v.clone(), u.clone())
    return True
fine = all(child_ends_well(child, 10) for _ in range(40))
stop.set()
for thread in threads:
    thread.join()
print(fine)
"""

# The threads of the parent stay behind. PyTorch's own ops would wait for them.
ON_SEVERAL_THREADS = """
torch.set_num_threads(2)
expected = [y.numpy() for y in calls()]
def child():
    return all(np.allclose(y.numpy(), z, 1e-4, 1e-4) for y, z in zip(calls(), expected))
print(all(child_ends_well(child) for _ in range(3)) and child())
"""


@pytest.mark.parametrize("program", [WHILE_THREADS_PACK, ON_SEVERAL_THREADS],
                         ids=["while threads pack", "on several threads"])
def test_forked_children_run_the_kernels(program: str) -> None:
    if backends.available()["cpp"] is not None:
        pytest.skip(str(backends.available()["cpp"]))
    run = subprocess.run([sys.executable, "-c", PRELUDE + program], capture_output=True, text=True,
                         timeout=600)
    assert run.stdout.strip() == "True", run.stderr
