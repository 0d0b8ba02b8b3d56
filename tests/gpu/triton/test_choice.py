"""The kernels that unmeasured GPUs run by default are those that the roofline chooses."""

import pytest
from gpu_choice import CARDS, MEASURED, OPS, ROOT, chosen, gains, mean, measured, table

from adacomcat.ops import backends


@pytest.mark.parametrize("op", OPS)
def test_the_default_is_what_the_roofline_chooses(op: str) -> None:
    unmeasured = [name for name in CARDS if name != "sm_90"]
    wanted = op in backends.TRITON_FOR_INFERENCE
    assert [chosen(op, name) for name in unmeasured] == [wanted] * len(unmeasured)
    assert backends.PREDICTED_CAPABILITY == (8, 0)


@pytest.mark.parametrize("op", MEASURED)
def test_the_roofline_promises_no_more_than_half_again_of_what_was_measured(op: str) -> None:
    predicted, found = gains(op, "sm_90"), measured(op)
    assert 1 / 1.5 < mean(predicted) / mean(found) < 1.5


def test_the_report_has_the_same_numbers() -> None:
    assert table() in (ROOT / "bench" / "gpu" / "CHOICE.md").read_text(encoding="utf-8")
