"""Every kernel on a real GPU, against float64; the same cases as in the interpreter."""

import pytest
import torch
from cases import DTYPES, UNITS, Case, draw, incoming, oracles, precision, run_kernels, worst
from shapes import DEIT, ragged, vision
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
CASES = [
    *ragged(),
    *(case for model in DEIT for tokens in (197, 394) for case in vision(model, tokens)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
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
