"""Which implementation of an op runs: what is available here, why not, and the choice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from adacomcat import reference
from adacomcat.errors import UserError


def _load_extension() -> tuple[ModuleType | None, str | None]:
    """The compiled extension, or the reason why there is none."""
    try:
        return import_module("adacomcat._C"), None
    except ModuleNotFoundError:
        return None, "the C++ extension was not built: install again where torch is installed"
    except ImportError as error:
        return None, f"the C++ extension does not load ({error}): install again with this torch"


_EXTENSION, _NO_EXTENSION = _load_extension()
_FORCED: ContextVar[str | None] = ContextVar("adacomcat_backend", default=None)

# What `pick` tries, in this order. Not the C++ kernel: on AVX2 it takes 1.1 to 1.3 times as long as
# the library's two products, and 4 times with a GELU, which it computes one element at a time
# (bench/test_ops.py).
PREFERENCE = ("reference",)
CPP_OPS = ("low_rank_linear", "batched_svd")
CUDA_OPS = ("low_rank_linear", "batched_svd", "truncation_errors")
# Decompositions: LAPACK takes small matrices one by one, on one thread (bench/test_svd.py).
DECOMPOSITIONS = ("batched_svd", "truncation_errors")
DECOMPOSITION_PREFERENCE = ("cuda", "cpp", "reference")
SVD_WIDTH = 128


def available() -> dict[str, str | None]:
    """Every backend: None where it can run on this machine, else the reason why it cannot."""
    return {
        "reference": None,
        "cpp": _NO_EXTENSION,
        "triton": _no_triton(),
        "cuda": _no_cuda(),
    }


def build_info() -> dict[str, object] | None:
    """Compiler, torch and CPU features of the C++ extension; None without one."""
    return None if _EXTENSION is None else _EXTENSION.build_info()


def refusal(backend: str, op: str, x: Tensor) -> str | None:
    """Why `backend` cannot run `op` on `x`; None if it can."""
    reasons = available()
    if backend not in reasons:
        return f"there is no such backend; choose one of {', '.join(reasons)}"
    if reasons[backend] is not None:
        return reasons[backend]
    checks = {"cpp": _no_cpp_kernel, "cuda": _no_cuda_kernel}
    return checks[backend](op, x) if backend in checks else None


def pick(op: str, x: Tensor) -> str:
    """The backend that runs `op` on `x`: the one in use, else the first able one preferred."""
    forced = _FORCED.get()
    if forced is not None:
        reason = refusal(forced, op, x)
        if reason is not None:
            raise UserError(f"backend '{forced}' cannot run {op}: {reason}")
        return forced
    preference = DECOMPOSITION_PREFERENCE if op in DECOMPOSITIONS else PREFERENCE
    return next(name for name in preference if refusal(name, op, x) is None)


def kernel(op: str, x: Tensor) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The function that runs `op` on `x`, with the signature of the reference."""
    suffix = {"cpp": "cpu", "cuda": "cuda"}.get(pick(op, x))
    return getattr(torch.ops.adacomcat, f"{op}_{suffix}") if suffix else getattr(reference, op)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on one backend; an op that it cannot run raises UserError with the reason."""
    reasons = available()
    if name not in reasons:
        raise UserError(f"unknown backend '{name}'; choose one of {', '.join(reasons)}")
    if reasons[name] is not None:
        raise UserError(f"backend '{name}' is not available here: {reasons[name]}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def _no_cpp_kernel(op: str, x: Tensor) -> str | None:
    if op not in CPP_OPS:
        return f"it has no C++ kernel; those with one are {', '.join(CPP_OPS)}"
    if x.device.type != "cpu":
        return f"the kernel runs on the CPU and the input is on {x.device}"
    if op == "batched_svd":
        return _no_small_svd(x, min(x.shape[-2:]))
    return _wrong_dtype(x, torch.float32)


def _no_cuda_kernel(op: str, x: Tensor) -> str | None:
    if op not in CUDA_OPS:
        return f"it has no CUDA kernel; those with one are {', '.join(CUDA_OPS)}"
    if x.device.type != "cuda":
        return f"the kernel runs on GPUs and the input is on {x.device}"
    if op == "batched_svd":
        return _no_small_svd(x, max(x.shape[-2:]))
    if op == "truncation_errors":
        return _wrong_dtype(x, torch.float32, torch.float64)
    return _wrong_dtype(x, torch.float16, torch.bfloat16)


def _no_small_svd(x: Tensor, width: int) -> str | None:
    if width > SVD_WIDTH:
        return f"the kernel takes matrices up to {SVD_WIDTH} wide and this one is {width}"
    return _wrong_dtype(x, torch.float32, torch.float64)


def _wrong_dtype(x: Tensor, *dtypes: torch.dtype) -> str | None:
    if x.dtype in dtypes:
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in (*dtypes, x.dtype)]
    return f"the kernel takes {' and '.join(names[:-1])} and the input is {names[-1]}"


def _no_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    from adacomcat.kernels import KERNELS

    return None if KERNELS else "this version has no Triton kernels"


def _no_cuda() -> str | None:
    if _EXTENSION is None:
        return _NO_EXTENSION
    if not _EXTENSION.build_info()["cuda"]:
        return "the extension was built without CUDA kernels"
    return None if torch.cuda.is_available() else "torch sees no GPU"
