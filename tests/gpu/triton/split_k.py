"""Cases of the kernels that add split-k partial sums; the ops' cases rarely reach them."""

from dataclasses import dataclass

import torch
from kernel_cases import TensorCores
from kernel_shapes import DEIT
from torch import Tensor


@dataclass(frozen=True)
class Splits:
    """Partial sums (splits, rows, rank), whose sum is multiplied by a factor (columns, rank)."""

    splits: int
    rows: int
    rank: int
    columns: int

    @property
    def id(self) -> str:
        return f"split_k-{self.splits}x{self.rows}x{self.rank}x{self.columns}"


RAGGED = [Splits(*sizes) for sizes in (
    (2, 1, 1, 1), (3, 7, 5, 9), (2, 33, 17, 29), (5, 65, 33, 71), (4, 197, 24, 40),
    (2, 130, 12, 100), (7, 15, 3, 130), (3, 50, 100, 18), (2, 18, 300, 24), (9, 64, 32, 64),
)]  # fmt: skip
VISION = [Splits(4, tokens, rank, width)
          for width, rank, _ in DEIT.values() for tokens in (197, 394)]


def draw(case: Splits, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The partial sums in float32, the factor, and a bias."""
    generator = torch.Generator().manual_seed(case.rows)
    partial, u, bias = (torch.randn(*size, generator=generator) for size in (
        (case.splits, case.rows, case.rank), (case.columns, case.rank), (case.columns,)))
    return partial / case.splits**0.5, (u / case.rank**0.5).to(dtype), bias.to(dtype)


def results(partial: Tensor, u: Tensor, bias: Tensor) -> dict[str, Tensor]:
    total = partial.sum(0).to(u.dtype)
    return {"total": total, "middle": total, "out": total @ u.t() + bias}


def oracles(
    dtype_name: str, partial: Tensor, u: Tensor, bias: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results in float64, and those of the formula at the same dtype and precision."""
    exact = results(partial.double(), u.double(), bias.double())
    with TensorCores(tf32=dtype_name == "tf32"):
        return exact, results(partial, u, bias)


def run_kernels(partial: Tensor, u: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The results of `sum_splits_kernel` and of `expand_splits_kernel`."""
    from adacomcat.kernels import reductions
    from adacomcat.kernels.expand_splits import expand_splits

    _, rows, rank = partial.shape
    out, middle = u.new_empty(rows, u.shape[0]), u.new_empty(rows, rank)
    expand_splits(partial, u, bias, None, out, middle)
    return {"total": reductions.sum_splits(partial, u.dtype), "middle": middle, "out": out}
