"""Fixtures that tests of several rooms share."""

import gc
import importlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import instruction_sets

from adacomcat import cli
from adacomcat.ops import backends

# What `make check` leaves out: compiling and emulating GPU kernels, and whole runs.
SLOW = ("gpu", "fuzz", "repo/test_demo.py", "repo/test_imagenet_recipe.py", "repo/test_quality.py",
        "repo/test_docs_code.py", "cli/test_cli_train.py", "cli/test_surroundings.py",
        "cli/test_several_processes.py", "torture",
        "distill/test_recovery.py", "test_train.py", "ops/test_cpu_rounding.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = [Path(__file__).parent / name for name in SLOW]
    for item in items:
        if any(item.path.is_relative_to(path) for path in slow):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """What is imported stays: the collector of garbage need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Every test draws its own numbers, the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors, those of C++ included, hold NaN until something is written into them."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "generic", "avx2", "avx512"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Plain PyTorch, and the C++ kernel on each instruction set of this CPU."""
    if request.param == "reference":
        with backends.use_backend("reference"):
            yield "reference"
        return
    if backends.available()["cpp"] is not None:
        pytest.skip(str(backends.available()["cpp"]))
    extension = importlib.import_module("adacomcat._C")
    here = backends.build_info()["instruction_set"]
    if not extension.use_instruction_set(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    with backends.use_backend("cpp"):
        yield request.param
    extension.use_instruction_set(here)


@pytest.fixture(params=instruction_sets.NAMES)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this CPU has or that is computed in software here."""
    before = instruction_sets.here()
    if not instruction_sets.use(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    with backends.use_backend("cpp"):
        yield request.param
    instruction_sets.use(before)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(capsys):
    """(exit code, stdout, stderr) of one command in this process."""
    def call(*argv):
        code = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err
    return call


@pytest.fixture
def run_json(run):
    def call(*argv, code=0):
        found, out, err = run(*argv, "--json")
        assert found == code, err
        return json.loads(out)
    return call
