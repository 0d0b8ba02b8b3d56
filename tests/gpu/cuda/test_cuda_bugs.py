"""The checks of the CUDA kernels notice seeded bugs: in the sources, and in the PTX."""

import cuda_host
import cuda_ptx
import pytest
from cuda_bugs import BUGS, RIGHT, Bug, noticed, ptx_tally, right_linear
from cuda_host import Host
from ptx.mutations import ALL_MUTANTS

pytestmark = pytest.mark.skipif(cuda_host.missing() is not None, reason=str(cuda_host.missing()))


@pytest.mark.parametrize("mode", ["quick", *(["asan", "tsan"] if ALL_MUTANTS else [])])
def test_nothing_is_noticed_without_a_bug(mode: str) -> None:
    for right in dict.fromkeys([*RIGHT.values(), right_linear]):
        assert right(Host(mode, seed=1))


@pytest.mark.parametrize("bug", BUGS if ALL_MUTANTS else BUGS[3::8], ids=lambda bug: bug.name)
def test_a_bug_is_noticed(bug: Bug) -> None:
    """`make mutants` runs all."""
    assert noticed(bug, bug.check)


@pytest.mark.skipif(cuda_ptx.missing() is not None, reason=str(cuda_ptx.missing()))
@pytest.mark.parametrize("op, step", [("batched_svd", 24), ("low_rank_linear", 3),
                                      ("low_rank_mlp", 6), ("low_rank_attention", 6)])
def test_damaged_ptx_is_noticed(op: str, step: int) -> None:
    """Some of it; bench/gpu/CUDA.md has the whole tally."""
    tally = ptx_tally(op, "sm_80", step)
    for count in tally.values():
        assert count["caught"] == count["all"], tally
