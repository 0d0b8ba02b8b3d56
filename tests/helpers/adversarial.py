"""Operands that break arithmetic: every size, outliers, denormals, infinities, masks."""

from collections.abc import Callable

import torch
from torch import Tensor

# The decimal exponents that leave room for products of four operands, and for their sums.
ROOM = {torch.float32: 8, torch.bfloat16: 8, torch.float16: 1}
TINY = torch.finfo(torch.float32).tiny


def of_any_size(x: Tensor) -> Tensor:
    """Rows of sizes that differ by many orders of magnitude."""
    most = ROOM[x.dtype]
    return x * 10.0 ** (most * (2 * torch.rand(*x.shape[:-1], 1) - 1))


def with_an_outlier(x: Tensor) -> Tensor:
    """One column a hundred to three thousand times the others."""
    x = x.clone()
    x[..., chosen(x.shape[-1])] *= 100 if x.dtype == torch.float16 else 3000
    return x


def denormal(x: Tensor) -> Tensor:
    return x.float() * torch.finfo(x.dtype).tiny / 16


def with_infinity(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[chosen(x.numel())] = torch.inf if chosen(2) else -torch.inf
    return x


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[chosen(x.numel())] = torch.nan
    return x


def constant(x: Tensor) -> Tensor:
    return x.flatten()[:1].expand(x.shape).clone()


def chosen(count: int) -> int:
    return int(torch.randint(count, ()))


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "of any size": of_any_size,
    "outlier": with_an_outlier,
    "denormal": denormal,
    "constant": constant,
    "zeros": torch.zeros_like,
    "infinity": with_infinity,
    "nan": with_nan,
}


def draw(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Operands of one kind; normal where there is no element to change."""
    x = torch.randn(shape).to(dtype)
    return KINDS[kind](x).to(dtype) if x.numel() else x


def mask(tokens: int, dtype: torch.dtype) -> Tensor | None:
    """None, causal or padded masks, boolean or of any size that the dtype has."""
    info = torch.finfo(dtype)
    sizes = [info.min, -1e4, 1e4, -torch.inf, 3.0]
    if dtype != torch.float16:
        sizes += [-1e9, -1e10, 1e10, -1e12, -1e20, 1e30]
    size, kind = sizes[chosen(len(sizes))], chosen(6)
    if kind == 0:
        return None
    if kind == 1:
        return torch.rand(tokens, tokens) < 0.6
    if kind == 2:
        return torch.full((tokens, tokens), size, dtype=dtype)
    if kind == 3:
        return torch.full((tokens, tokens), size, dtype=dtype).triu(1)
    padded = torch.randn(tokens, tokens).to(dtype)
    padded[chosen(tokens)] = size
    if kind == 4:
        padded[:, chosen(tokens)] = size
    return padded
