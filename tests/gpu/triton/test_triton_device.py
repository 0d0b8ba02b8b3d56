"""Every kernel on a real GPU against float64, with the cases of the interpreter."""

import pytest
import torch
from kernel_cases import DTYPES, UNITS, Case, draw, incoming, oracles, precision, run_kernels, worst
from kernel_shapes import ragged_and_vision
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ragged_and_vision(), ids=lambda case: case.id)
def test_on_the_gpu(case: Case, dtype: str) -> None:
    kind, setting = DTYPES[dtype]
    arguments = draw(case, kind)
    grad = incoming(case, arguments)
    exact, plain = oracles(case, dtype, arguments, grad)
    moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    with precision(setting):
        actual = run_kernels(case, moved, grad.cuda())
    found = {name: tensor.cpu() for name, tensor in actual.items()}
    assert worst(found, exact, plain, UNITS[dtype]) == []
