"""Matrices that are hard to decompose, and what a decomposition must satisfy."""

import math

import torch
from torch import Tensor


def check(a: Tensor, u: Tensor, s: Tensor, v: Tensor, factor: float = 1.0,
          eps: float | None = None) -> None:
    """Residual, orthogonality, order and signs, in units of ε, by default that of the dtype."""
    k, eps = s.shape[-1], eps or torch.finfo(a.dtype).eps
    assert u.shape == (*a.shape[:-1], k) and v.shape == (*a.mT.shape[:-1], k)
    if a.numel() == 0:
        return
    bound = factor * 16 * eps * math.sqrt(max(a.shape[-2:]))
    a, u, s, v = (t.double() for t in (a, u, s, v))
    exact = torch.linalg.svdvals(a)
    scale = exact[..., :1].clamp_min(1e-300)
    assert ((s - exact[..., :k]).abs() <= bound * scale).all()
    assert (s[..., 1:] <= s[..., :-1]).all() and (s >= 0).all()
    best = exact[..., k:].square().sum(-1).sqrt()
    residual = torch.linalg.matrix_norm(a - (u * s.unsqueeze(-2)) @ v.mT)
    assert (residual <= best + bound * scale[..., 0] * math.sqrt(min(a.shape[-2:]))).all()
    identity = torch.eye(k, dtype=torch.float64)
    for basis in (u, v):
        assert ((basis.mT @ basis - identity).abs() <= bound).all()
    if k:
        assert (u.amax(-2) >= -u.amin(-2)).all()


def of_low_rank(name: str, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """(m, n) whose rank is one or two but for rounding errors, or exactly."""
    column, row = torch.randn(m, 1, dtype=dtype), torch.randn(1, n, dtype=dtype)
    return {
        "equal rows": lambda: row.expand(m, n),
        "equal columns": lambda: column.expand(m, n),
        "constant": lambda: column[:1].expand(m, n),
        "rank 1": lambda: column @ row,
        "rank 2": lambda: torch.randn(m, 2, dtype=dtype) @ torch.randn(2, n, dtype=dtype),
        "a zero column": lambda: torch.randn(m, n, dtype=dtype) * torch.arange(n).bool(),
        "one element": lambda: torch.eye(m, n, dtype=dtype) * torch.arange(n).eq(0),
        "rows in pairs": lambda: torch.randn(m, n, dtype=dtype)[torch.arange(m) // 2],
    }[name]().contiguous()


LOW_RANKS = ("equal rows", "equal columns", "constant", "rank 1", "rank 2", "a zero column",
             "one element", "rows in pairs")


def hard(name: str, n: int, dtype: torch.dtype) -> Tensor:
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    p = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    spectra = {
        "condition 1e12": torch.logspace(0, -12, n, dtype=torch.float64),
        "clusters": torch.ones(n, dtype=torch.float64).index_fill_(0, torch.arange(n // 2), 3.0),
        "rank 3": torch.arange(n).lt(3).double(),
        "huge": torch.linspace(1, 2, n, dtype=torch.float64) * 1e30,
        "tiny": torch.linspace(1, 2, n, dtype=torch.float64) * 1e-30,
    }
    if name == "kahan":  # misleads pivoting by column norms
        sine, cosine = math.sin(1.2), math.cos(1.2)
        upper = torch.eye(n, dtype=torch.float64) - cosine * torch.ones(n, n).double().triu(1)
        return (sine ** torch.arange(n).double().unsqueeze(-1) * upper).to(dtype)
    if name == "zeros":
        return torch.zeros(n, n, dtype=dtype)
    if name == "identity":
        return torch.eye(n, dtype=dtype)
    return ((q * spectra[name]) @ p.mT).to(dtype)
