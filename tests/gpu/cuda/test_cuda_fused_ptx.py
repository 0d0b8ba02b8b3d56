"""nvcc's PTX of the fused ops, executed on the emulator: results, bounds, races, bytes moved."""

from dataclasses import replace

import cuda_ptx
import pytest
from cuda_cases import complaints, deit, traffic
from cuda_ptx import Emulated, outside
from kernel_cases import Case
from kernel_shapes import ragged, vision
from ptx.memory import SECTOR
from ptx.mutations import ALL_MUTANTS
from test_cuda_low_rank_linear import TYPES

from adacomcat.ops import backends

pytestmark = pytest.mark.skipif(cuda_ptx.missing() is not None, reason=str(cuda_ptx.missing()))
BY_ID = {case.id: case for case in ragged()}
# For few rows, for many, and between: several blocks for the same 128 rows.
SHOWN = [("low_rank_mlp-odd-sublayer", 132), ("low_rank_mlp-aligned", 1),
         ("low_rank_mlp-wide-ranks", 4), ("low_rank_attention-rows-sublayer", 132),
         ("low_rank_attention-additive", 1), ("low_rank_attention-wide-values", 132),
         ("gated_low_rank_linear-odd", 1)]


@pytest.mark.parametrize("architecture", ["sm_80", *(["sm_90"] if ALL_MUTANTS else [])])
@pytest.mark.parametrize("dtype", TYPES if ALL_MUTANTS else ["bf16"])
@pytest.mark.parametrize("name, count", SHOWN, ids=str)
def test_fused_ops(name: str, count: int, dtype: str, architecture: str) -> None:
    case: Case = BY_ID[name]
    if name == "low_rank_mlp-odd-sublayer":
        case = replace(case, sizes=case.sizes | {"lead": (35,)})
    assert complaints(Emulated(architecture, multiprocessors=count), case, dtype) == []


@pytest.mark.parametrize("case", [case for case in vision("deit_s", 197)
                                  if case.sublayer and case.op in backends.CUDA_OPS],
                         ids=lambda case: case.id)
def test_a_vision_transformer(case: Case) -> None:
    """Attention and MLP of a block of DeiT-S, one image."""
    assert complaints(Emulated("sm_80", multiprocessors=108), case, "bf16") == []


@pytest.mark.parametrize("count", [132, 1])
@pytest.mark.parametrize("op, launches", [("low_rank_linear", 1), ("low_rank_mlp", 2),
                                          ("low_rank_attention", 3)])
def test_each_input_and_output_moves_once(op: str, launches: int, count: int) -> None:
    """Beside what one launch leaves to the next. A single launch suffices an MLP of many rows."""
    sizes = (197, 384, 128, 6) if ALL_MUTANTS else (37, 96, 24, 3)
    found, least = traffic(op, deit(*sizes)[op], "sm_80", count)
    assert len(found) == (1 if op == "low_rank_mlp" and count == 1 else launches)
    assert outside(found) <= 1.15 * least
    if op == "low_rank_mlp" and count == 1:  # only y is written, not the hidden layer
        assert found[0].counts.ideal["store"] * SECTOR == 2 * sizes[0] * sizes[1]
