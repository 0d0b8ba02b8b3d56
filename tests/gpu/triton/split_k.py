"""The kernels that add up parts of a sum, called by themselves: ops reach them at few shapes."""

from dataclasses import dataclass

import torch
from kernel_cases import TensorFloat32
from kernel_shapes import DEIT
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """`count` parts (rows, rank), whose sum goes through a factor (columns, rank)."""

    count: int
    rows: int
    rank: int
    columns: int

    @property
    def id(self) -> str:
        return f"parts-{self.count}x{self.rows}x{self.rank}x{self.columns}"


RAGGED = [Parts(*sizes) for sizes in (
    (2, 1, 1, 1), (3, 7, 5, 9), (2, 33, 17, 29), (5, 65, 33, 71), (4, 197, 24, 40),
    (2, 130, 12, 100), (7, 15, 3, 130), (3, 50, 100, 18), (2, 18, 300, 24), (9, 64, 32, 64),
)]  # fmt: skip
VISION = [Parts(4, tokens, rank, width)
          for width, rank, _ in DEIT.values() for tokens in (197, 394)]


def draw(case: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The parts in float32, the factor, and a bias."""
    generator = torch.Generator().manual_seed(case.rows)
    parts, u, bias = (torch.randn(*size, generator=generator) for size in (
        (case.count, case.rows, case.rank), (case.columns, case.rank), (case.columns,)))
    return parts / case.count**0.5, (u / case.rank**0.5).to(dtype), bias.to(dtype)


def results(parts: Tensor, u: Tensor, bias: Tensor) -> dict[str, Tensor]:
    total = parts.sum(0).to(u.dtype)
    return {"total": total, "middle": total, "out": total @ u.t() + bias}


def oracles(
    dtype_name: str, parts: Tensor, u: Tensor, bias: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As `cases.oracles`: exact in float64, and plain PyTorch's."""
    exact = results(parts.double(), u.double(), bias.double())
    if dtype_name != "tf32":
        return exact, results(parts, u, bias)
    with TensorFloat32():
        return exact, results(parts, u, bias)


def run_kernels(parts: Tensor, u: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The same by `sum_splits_kernel` and by `expand_splits_kernel`."""
    from adacomcat.kernels import low_rank_mlp, reductions

    _, rows, rank = parts.shape
    out, middle = u.new_empty(rows, u.shape[0]), u.new_empty(rows, rank)
    low_rank_mlp._expand_splits(parts, u, bias, None, out, middle)
    return {"total": reductions.sum_splits(parts, u.dtype), "middle": middle, "out": out}
