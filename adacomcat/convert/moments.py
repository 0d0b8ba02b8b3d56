"""Means and covariances of rows that come in batches: products in float32, sums in float64."""

import torch
from torch import Tensor, nn

from adacomcat.layers.attention import Context, LowRankAttention

# Rounding of float32 leaves constant features about this variance, relative to their square.
ROUNDING = 1e-10
SHIFT_ROWS = 256  # rows that tell roughly where the mean of all lies
# A product of rows with themselves is symmetric: of so many panels only the upper ones are made.
PANELS, LEAST_PANEL = 6, 256


class Moments:
    """Running moments of (M, d) rows, of float32 or float64; batches are summed up in float64.

    Products are those of the rows minus about the first batch's mean. The variance of features
    whose mean is large, or which never change, would else drown in rounding.
    """

    shift: Tensor  # (d,), from the first ``add`` on, as all below
    sum: Tensor  # (d,) of the shifted rows

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor, weight: int = 1) -> Tensor:
        """Returns the shifted rows; each counts as ``weight`` rows."""
        if not self.count:
            few = rows[::max(1, len(rows) // SHIFT_ROWS)]
            self.shift = few.mean(0, dtype=torch.float64).to(rows.dtype)
            self.sum = torch.zeros_like(self.shift, dtype=torch.float64)
            self._upper = self.sum.new_zeros(len(self.sum), len(self.sum))
        self.count += weight * len(rows)
        rows = rows - self.shift
        self.sum += weight * rows.sum(0).double()
        for block in _panels(len(self.sum)):
            product = rows[:, block].mT @ rows[:, block.start:]
            self._upper[block, block.start:].add_(product, alpha=weight)
        return rows

    @property
    def products(self) -> Tensor:
        """(d, d) sums of the shifted rows' outer products."""
        upper = self._upper.triu()
        return upper + upper.mT - torch.diag(upper.diagonal())

    def mapped(self, rows: Tensor) -> "Moments":
        """The moments of x ``rows``ᵀ, with rows (n, d)."""
        part, rows = Moments(), rows.double()
        part.count, part.shift, part.sum = self.count, rows @ self.shift.double(), rows @ self.sum
        part._upper = rows @ self.products @ rows.mT
        return part

    def of(self, features: Tensor) -> "Moments":
        """The moments of these features alone."""
        part = Moments()
        part.count, part.shift, part.sum = self.count, self.shift[features], self.sum[features]
        part._upper = self.products[features][:, features]
        return part

    @property
    def mean(self) -> Tensor:
        return self.shift.double() + self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Every feature has at least the variance that rounding gives it."""
        covariance = self.products.div_(self.count)
        rest = self.sum / self.count
        covariance -= torch.outer(rest, rest)
        covariance.diagonal().clamp_min_(0).add_(ROUNDING * self.mean.square())
        return covariance


def _panels(width: int) -> list[slice]:
    size = max(LEAST_PANEL, -(-width // PANELS))
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]


def at_least_float32(rows: Tensor) -> Tensor:
    """Sums of bfloat16 and float16 would round away what they are made for."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


class TokenMoments:
    """Moments of tokens x (B, N, d), and of the mean token x̄ of each image."""

    def __init__(self) -> None:
        self.tokens, self.images = Moments(), Moments()

    def add(self, x: Tensor) -> None:
        x = at_least_float32(x)
        self.tokens.add(x.flatten(0, 1))
        self.images.add(x.mean(1), weight=x.shape[1])

    def key_covariance(self, covariance: Tensor) -> Tensor:
        """Of x - x̄, which is all that a softmax sees of its keys: Cov(x) - Cov(x̄).

        covariance: that of the tokens.
        """
        found = covariance - self.images.covariance
        variance = found.diagonal()
        variance.copy_(torch.maximum(variance, ROUNDING * covariance.diagonal()))
        return found


def averaged_values(attn: LowRankAttention, x: Tensor, wv: Tensor, context: Context) -> Tensor:
    """(B, N, H·r): each head's average of its values x wv_hᵀ, for wv (H, r, d)."""
    values = nn.functional.linear(x, wv.flatten(0, 1)).unflatten(-1, (len(wv), -1))
    return attn.average(x, values.transpose(1, 2), *context).transpose(1, 2).flatten(2)


# The variance of averaged tokens is only the measure of a ridge: every fourth image tells it.
VARIANCE_EVERY = 4


class AveragedTokens:
    """Mean and variance of z_h = P_h x, what each head h averages, over a part of the images.

    z, (H, B·N, d), is large. What must be exact is known of the values wv_h z_h instead.
    """

    def __init__(self, wv: Tensor) -> None:
        """wv: (H, r, d)."""
        self.wv = wv.double()
        self.sum = self.wv.new_zeros(len(wv), wv.shape[2])
        self.squares = self.wv.new_zeros(len(wv))
        self.rows = 0

    def add(self, attn: LowRankAttention, x: Tensor, context: Context) -> None:
        """x (B, N, d), averaged with the probabilities of ``attn``."""
        # A mask or an embedding may belong to single images of the batch.
        few = x[::VARIANCE_EVERY] if context == (None, None) else x
        z = at_least_float32(attn.average(few, few.unsqueeze(1), *context))  # (B, H, N, d)
        self.sum += z.sum((0, 2), dtype=torch.float64)
        self.squares += z.square().sum((0, 2, 3), dtype=torch.float64)
        self.rows += z.shape[0] * z.shape[2]

    def mean(self, of_values: Tensor) -> Tensor:
        """(H, d) of z, moved to where wv_h times it is ``of_values`` (H·r,), the values' mean."""
        mean = self.sum / self.rows
        missing = of_values.view(len(self.wv), -1) - torch.einsum("hrd,hd->hr", self.wv, mean)
        return mean + torch.einsum("hdr,hr->hd", torch.linalg.pinv(self.wv), missing)

    @property
    def variance(self) -> Tensor:
        """(H,), the mean over the features of z."""
        mean = self.sum / self.rows
        return (self.squares / self.rows - mean.square().sum(1)).clamp_min(0) / mean.shape[1]
