"""CUDA kernels spill nowhere. The build by setup.py fails where one does, on every architecture;
`make mutants` compiles them apart, and looks at the registers too."""

import re
from pathlib import Path

import cuda_ptx
import pytest
from cuda_report import ARCHITECTURES, resources
from ptx.mutations import ALL_MUTANTS
from ptx.parser import search

ROOT = Path(__file__).parents[3]


def test_the_build_fails_where_a_kernel_spills() -> None:
    flags = search(r"NVCC_FLAGS = \[(.*?)\]", (ROOT / "setup.py").read_text())[1]
    assert "-Xptxas=--warn-on-spills" in flags and "-Xptxas=-Werror" in flags


def test_the_architectures_are_those_of_setup() -> None:
    listed = search(r"ARCHITECTURES = \((.*?)\)", (ROOT / "setup.py").read_text())[1]
    assert [int(name) for name in re.sub(r'[".]', "", listed).split(",")] == list(ARCHITECTURES)


@pytest.mark.skipif(cuda_ptx.missing() is not None, reason=str(cuda_ptx.missing()))
@pytest.mark.skipif(not ALL_MUTANTS, reason="make mutants")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_spilled(architecture: int) -> None:
    """A spill is an error, of ptxas too; and the registers suffice for a block."""
    found = list(resources(architecture))
    assert len(found) == 8 + 5 + 8 + 3 + 5  # decompositions, linear, MLP, attention, projections
    for one in found:
        assert one.spilled == 0, one
        threads = 512 if "a block" in one.kernel else 128
        assert one.registers * threads <= 65536, one
