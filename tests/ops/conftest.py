"""Fixtures of the tests of ops: the instruction set, the number of threads."""

from collections.abc import Iterator

import pytest
import torch
from helpers import instruction_sets

from adacomcat.ops import backends


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
