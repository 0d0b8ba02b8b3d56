"""Which implementation of an op runs: what is available here, why not, and the choice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adacomcat import kernels
from adacomcat.errors import UserError
from adacomcat.ops import autograd_cpu, reference, shapes


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

# What `pick` tries, in this order: bench/RESULTS.md shows that the C++ kernels win.
PREFERENCE = ("cpp", "triton", "cuda", "reference")
# Those for GPUs come before plain PyTorch where they were faster on an H200 (bench/gpu/RESULTS.md);
# on older ones and AMD's nothing was measured. Of Triton's 16-bit types: float32 is not faster.
MEASURED_CAPABILITY = (9, 0)
TRITON_FOR_INFERENCE = ("low_rank_mlp", "low_rank_attention")
TRITON_FOR_TRAINING = ("low_rank_attention",)
CUDA_FIRST = ("batched_svd",)
SPECTRA = ("gram", "eigenvalues", "singular_values")  # what only the CPU has kernels for
CPP_OPS = ("low_rank_linear", "low_rank_mlp", "dense_mlp", "low_rank_attention",
           "class_attention", "linear", "patch_embedding", "batched_svd", *SPECTRA)
CUDA_OPS = ("low_rank_linear", "batched_svd", "truncation_errors")
CUDA_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Decompositions give no intermediates, and want more digits.
DECOMPOSITIONS = ("batched_svd", "truncation_errors", *SPECTRA)
DECOMPOSITION_DTYPES = (torch.float32, torch.float64)
# Of the smaller side; for CUDA of both. From 96 on LAPACK takes one float64 matrix faster, but it
# loses digits of small singular values of graded ones, and only a QR would tell which are graded.
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
    if backend == "cpp":
        return _NO_EXTENSION or _no_cpp_kernel(op, x)
    if backend == "triton":
        return _no_triton() or _no_triton_kernel(op, x)
    if backend == "cuda":
        return _no_cuda() or _no_cuda_kernel(op, x)
    reasons = available()
    if backend not in reasons:
        return f"there is no such backend; choose one of {', '.join(reasons)}"
    return reasons[backend]


def pick(op: str, x: Tensor, keep: bool = False) -> str:
    """The backend that runs `op` on `x`: the one in use, else the first able one preferred.

    `keep`: gradients will follow.
    """
    forced = _FORCED.get()
    if forced is not None:
        reason = refusal(forced, op, x)
        if reason is not None:
            raise UserError(f"backend '{forced}' cannot run {op}: {reason}")
        return forced
    return next(name for name in PREFERENCE
                if refusal(name, op, x) is None and _is_faster(name, op, x, keep))


def _is_faster(backend: str, op: str, x: Tensor, keep: bool) -> bool:
    """Whether a kernel for GPUs is known to be faster than plain PyTorch; all others are."""
    if backend not in ("triton", "cuda"):
        return True
    if torch.version.hip or torch.cuda.get_device_capability(x.device) < MEASURED_CAPABILITY:
        return False
    if backend == "cuda":
        return op in CUDA_FIRST
    faster = TRITON_FOR_TRAINING if keep else TRITON_FOR_INFERENCE
    return op in faster and x.element_size() == 2


def in_use() -> str | None:
    """The backend that `use_backend` asks for."""
    return _FORCED.get()


def kernel(op: str, x: Tensor, keep: bool = True) -> Callable[..., tuple[Tensor, ...]]:
    """The function that runs `op` on `x`, with the signature of the reference."""
    backend = pick(op, x, keep)
    if backend in ("cpp", "cuda"):
        device = "cpu" if backend == "cpp" else "cuda"
        function = getattr(torch.ops.adacomcat, f"{op}_{device}").default
        return function if op in DECOMPOSITIONS else partial(function, keep=keep)
    if backend == "triton":
        return partial(kernels.load(op).forward, keep_intermediates=keep)
    return getattr(reference, op)


def backward_kernel(
    op: str, backend: str, grad: Tensor
) -> Callable[..., tuple[Tensor | None, ...]] | None:
    """The function that computes all gradients of `op` on `backend`; None where the formulas do.

    They also do where a gradient is traced or batched: kernels want memory that is there.
    """
    if type(grad) is not Tensor:
        return None
    if backend == "cpp":
        return getattr(autograd_cpu, op)
    return kernels.load(op).backward if backend == "triton" else None


def direct_kernel(op: str, x: Tensor) -> Callable[..., tuple[Tensor, ...]] | None:
    """The kernel for inference where `pick` would take C++ or Triton and nothing is traced.

    C++ without any Python in between; of Triton's those that serve whole sublayers.
    """
    if torch.compiler.is_compiling():
        return None
    if not x.is_cpu:
        sublayer = op in kernels.SUBLAYERS and type(x) is Tensor
        return _triton_kernel(op) if sublayer and pick(op, x) == "triton" else None
    if _FORCED.get() not in (None, "cpp") or refusal("cpp", op, x) is not None:
        return None
    return _cpu_kernel(op)


@cache  # of a small model these look-ups would be a part of its time
def _cpu_kernel(op: str) -> Callable[..., tuple[Tensor, ...]]:
    return getattr(torch.ops.adacomcat, f"{op}_cpu").default


@cache
def _triton_kernel(op: str) -> Callable[..., tuple[Tensor, ...]]:
    check, forward = getattr(shapes, op), kernels.load(op).forward

    def run(x: Tensor, *arguments: Any, residual: Tensor | None = None,
            epsilon: float | None = None) -> tuple[Tensor, ...]:
        shapes.residual(x, residual, check(x, *arguments)[0])
        return forward(x, *arguments, keep_intermediates=False, epsilon=epsilon, residual=residual)

    return run


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
    if not x.is_cpu:
        return f"the kernel runs on the CPU and the input is on {x.device}"
    if op not in DECOMPOSITIONS:
        return _no_dtype(x, KERNEL_DTYPES)
    if op in ("gram", "eigenvalues"):
        if _EXTENSION.build_info()["instruction_set"] == "generic":
            return "the kernel is for AVX2 and AVX512; a library's are faster without them"
        return _no_dtype(x, DECOMPOSITION_DTYPES if op == "gram" else (torch.float64,))
    width = min(x.shape[-2:])
    if width > SVD_WIDTH:
        return f"the kernel takes matrices up to {SVD_WIDTH} wide and this one is {width}"
    return _no_dtype(x, DECOMPOSITION_DTYPES)


def _no_dtype(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if x.dtype in dtypes:
        return None
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"the kernel takes {names} and the input is {str(x.dtype).removeprefix('torch.')}"


def _no_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def _no_triton_kernel(op: str, x: Tensor) -> str | None:
    if op not in kernels.KERNELS:
        return f"it has no Triton kernel; those with one are {', '.join(kernels.KERNELS)}"
    if x.device.type != "cuda":
        return f"the kernel runs on GPUs and the input is on {x.device}"
    return _no_dtype(x, KERNEL_DTYPES)


def _no_cuda() -> str | None:
    if _EXTENSION is None:
        return _NO_EXTENSION
    if not _EXTENSION.build_info()["cuda"]:
        return "the extension was built without CUDA kernels"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def _no_cuda_kernel(op: str, x: Tensor) -> str | None:
    if op not in CUDA_OPS:
        return f"it has no CUDA kernel; those with one are {', '.join(CUDA_OPS)}"
    if x.device.type != "cuda":
        return f"the kernel runs on GPUs and the input is on {x.device}"
    gpu = torch.cuda.get_device_properties(x.device)
    if (gpu.major, gpu.minor) < CUDA_CAPABILITY:
        return f"the kernels are for sm_80 and later and this GPU is sm_{gpu.major}{gpu.minor}"
    if op not in DECOMPOSITIONS:
        return _no_dtype(x, KERNEL_DTYPES)
    no_dtype = _no_dtype(x, DECOMPOSITION_DTYPES)
    if no_dtype or op != "batched_svd":
        return no_dtype
    rows, columns = x.shape[-2:]
    if max(rows, columns) > SVD_WIDTH:
        return (f"the kernel takes matrices up to {SVD_WIDTH} x {SVD_WIDTH} and this one is "
                f"{rows} x {columns}")
    needed = _EXTENSION.svd_shared_memory(rows, columns, x.element_size())
    if needed > gpu.shared_memory_per_block_optin:
        return (f"a matrix takes {needed} bytes of shared memory and a block of this GPU has "
                f"{gpu.shared_memory_per_block_optin}")
    return None
