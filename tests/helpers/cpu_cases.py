"""Cases that reach every path of the C++ kernels."""

import pytest
import torch
import torch.nn.functional as F
from helpers.op_cases import (
    CASES,
    DTYPES,
    Case,
    attention_case,
    convert,
    dense_case,
    linear_case,
    mlp_case,
)
from helpers.tolerance import assert_close_to_float64

from adacomcat import ops

# Ranks of one lane less and more than a vector, more columns than a panel, rows off any tile.
SHAPES = {
    "linear-197": linear_case((2, 197), 96, 33, 130, activation="gelu", residual=True),
    "linear-63": linear_case((61,), 31, 63, 15, activation="silu"),
    "linear-out1": linear_case((13,), 129, 17, 1, bias=False),
    "mlp-197": mlp_case((197,), 64, 24, 300, 40, "gelu"),
    "mlp-hidden": mlp_case((2, 50), 48, 15, 129, 65, "gelu_tanh"),
    "mlp-relu": mlp_case((25,), 33, 31, 256, 16, "relu"),
    "mlp-quick": mlp_case((50,), 40, 24, 129, 33, "quick_gelu"),
    "dense-197": dense_case((197,), 64, 300, 64, "gelu"),
    "dense-hidden": dense_case((2, 50), 47, 1027, 65, "gelu_tanh"),
    "dense-256": dense_case((25,), 33, 256, 16, "relu", bias=False),
    "linear-1100": linear_case((1100,), 40, 33, 77, activation="gelu"),  # rows in two parts
    "dense-thin": dense_case((2, 30), 70, 24, 50, "silu"),
    "mlp-identity": mlp_case((9,), 16, 5, 24, 7, None),
    "attention-197": attention_case(2, 197, 64, 4, 16, 24),
    "attention-long": attention_case(1, 523, 32, 2, 8, 33, "float", (1, 2, 523, 523)),
    "attention-wide": attention_case(1, 70, 200, 5, 9, 17),  # panels that end in one vector
    "attention-ranks": attention_case(1, 69, 48, 2, 70, 33),  # squares of keys, and what is left
    "attention-causal": attention_case(2, 65, 48, 3, 17, 7, "bool", (65, 65)),
}
ALL = {name: case for name, case in {**CASES, **SHAPES}.items()
       if case.op != "gated_low_rank_linear"}
each_case = pytest.mark.parametrize("case", ALL.values(), ids=ALL.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check_norm_and_residual(case: Case, dtype: torch.dtype) -> None:
    """A large mean, as residual streams have it, must not cost digits of the variance."""
    base = convert(case.draw(), dtype)
    base["x"] = base["x"] * 3 + 20
    residual = torch.randn_like(case.plain(**base, **case.options))

    def plain(tensors: dict, residual: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(tensors["x"], tensors["x"].shape[-1:], eps=1e-6)
        return case.plain(**{**tensors, "x": x}, **case.options) + residual

    actual = getattr(ops, case.op)(**base, **case.options, epsilon=1e-6, residual=residual)
    exact = plain(convert(base, torch.float64), residual.double())
    assert_close_to_float64(actual, exact, plain(base, residual))
