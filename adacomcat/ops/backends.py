"""Which implementation of an op runs: what this machine can run, why not the rest, and the choice.

``registry`` and the public functions ask ``pick``, ``kernel`` and ``direct_kernel``. Optional parts
come through ``extension``, which has the C++ kernels, and ``kernels.load``, which has Triton.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib.util import find_spec
from os import environ
from typing import Any

import torch
from torch import Tensor

from adacomcat import kernels
from adacomcat.errors import UserError
from adacomcat.ops import autograd_cpu, extension, measured, reference, refusals, shapes, transforms
from adacomcat.ops.extension import build_info as build_info
from adacomcat.ops.extension import cores as cores

_FORCED: ContextVar[str | None] = ContextVar("adacomcat_backend", default=None)
_PREFERRED: ContextVar[str | None] = ContextVar("adacomcat_preferred_backend", default=None)

# The order in which `pick` tries the backends; bench/RESULTS.md shows that the C++ kernels win.
PREFERENCE = ("cpp", "triton", "cuda", "reference")
# Where a GPU kernel comes before PyTorch, which is as fast in float32: as an H200 measured it
# (bench/gpu/RESULTS.md), and in inference on older GPUs as a roofline has it (bench/gpu/CHOICE.md).
MEASURED_CAPABILITY, PREDICTED_CAPABILITY = (9, 0), (8, 0)
TRITON_FOR_INFERENCE = ("low_rank_mlp", "low_rank_attention")
TRITON_FOR_TRAINING = ("low_rank_attention",)
CUDA_FIRST = ("batched_svd",)
# Without Triton (Jetson, Windows) a whole sublayer in CUDA C++ comes before its parts in PyTorch,
# for inference in 16 bits. It moves a fraction of the bytes; it was not timed.
CUDA_WITHOUT_TRITON = ("low_rank_mlp", "low_rank_attention")
# The ops with a compiled kernel for CPUs and for GPUs; `registry` declares each of these kernels.
SPECTRA = ("gram", "eigenvalues", "singular_values")
CPP_OPS = ("low_rank_linear", "low_rank_mlp", "dense_mlp", "low_rank_attention", "gated_mlp",
           "rotary_attention", "class_attention", "linear", "patch_embedding", "batched_svd",
           *SPECTRA)
CUDA_OPS = ("low_rank_linear", "gated_low_rank_linear", "low_rank_mlp", "dense_mlp",
            "low_rank_attention", "batched_svd", "truncation_errors")
# GPU kernels of these ops take the layer norm before and the residual after the sublayer, too.
GPU_SUBLAYERS = (*kernels.SUBLAYERS, "dense_mlp")
CUDA_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Decompositions have no intermediates, and want more digits.
DECOMPOSITIONS = ("batched_svd", "truncation_errors", *SPECTRA)
DECOMPOSITION_DTYPES = (torch.float32, torch.float64)
# The kernels' limit for the smaller side of a matrix, on GPUs for both sides. From 96 on LAPACK is
# faster for a single float64 matrix, but it loses digits of the small singular values of graded
# matrices, and only a QR decomposition would tell which matrices are graded.
SVD_WIDTH = 128

# A kernel returns what the op's schema says: a tensor, or a tuple of several.
Kernel = Callable[..., Any]


def available() -> dict[str, str | None]:
    """Backend → None where it can run on this machine, else the reason why it cannot."""
    return {
        "reference": None,
        "cpp": extension.MISSING,
        "triton": _no_triton(),
        "cuda": _no_cuda(),
    }


def refusal(backend: str, op: str, x: Tensor) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``x``; None if it can."""
    if backend == "cpp":
        return extension.MISSING or _no_cpp_kernel(op, x)
    if backend == "triton":
        return _no_triton() or _no_triton_kernel(op, x)
    if backend == "cuda":
        return _no_cuda() or _no_cuda_kernel(op, x)
    reasons = available()
    if backend not in reasons:
        return f"there is no such backend; choose one of {', '.join(reasons)}"
    return reasons[backend]


def compatible_backends(op: str, x: Tensor) -> list[str]:
    """The backends that can run an op on x on this machine, in the order in which ``pick`` tries
    them.

    Args:
        op: The op's name, as in ``adacomcat.ops``: 'low_rank_mlp', 'batched_svd', …
        x: The op's first argument; its device, dtype and for decompositions its shape decide.

    Returns:
        Names that ``use_backend`` takes; 'reference' is always among them. ``refusal`` gives the
        reason for every other backend.

    Raises:
        UserError: The op has no kernels to choose from.
    """
    names = dict.fromkeys((*kernels.KERNELS, *CPP_OPS, *CUDA_OPS))
    if op not in names:
        raise UserError(f"'{op}' is no op with kernels; choose one of {', '.join(names)}")
    return [name for name in PREFERENCE if refusal(name, op, x) is None]


def pick(op: str, x: Tensor, keep_intermediates: bool = False) -> str:
    """The backend that runs ``op`` on ``x``: the one in use, else of those that can run it the one
    that is preferred, the one that was measured to be the fastest here, or the first of
    ``PREFERENCE`` that is known to be faster than those behind it.

    Args:
        op: The op's name.
        x: The op's first argument.
        keep_intermediates: Whether gradients will follow.

    Raises:
        UserError: The backend in use cannot run the op; the message has the reason.
    """
    forced = _FORCED.get()
    if forced is not None:
        reason = refusal(forced, op, x)
        if reason is not None:
            raise UserError(f"backend '{forced}' cannot run {op}: {reason}")
        return forced
    wanted = preferred()
    first = [wanted] if wanted else measured.ranked(op, x.device, x.dtype, keep_intermediates)
    found = next((name for name in first if refusal(name, op, x) is None), None)
    return found or next(name for name in PREFERENCE if refusal(name, op, x) is None
                         and _is_faster(name, op, x, keep_intermediates))


def _is_faster(backend: str, op: str, x: Tensor, keep_intermediates: bool) -> bool:
    """Whether a GPU kernel was measured or predicted to beat plain PyTorch; True on CPUs."""
    if backend not in ("triton", "cuda"):
        return True
    if backend == "cuda" and op in CUDA_WITHOUT_TRITON:
        return find_spec("triton") is None and x.element_size() == 2 and not keep_intermediates
    if torch.version.hip:
        return False
    least = MEASURED_CAPABILITY if keep_intermediates else PREDICTED_CAPABILITY
    if torch.cuda.get_device_capability(x.device) < least:
        return False
    if backend == "cuda":
        return op in CUDA_FIRST
    faster = TRITON_FOR_TRAINING if keep_intermediates else TRITON_FOR_INFERENCE
    return op in faster and x.element_size() == 2


def preferred() -> str | None:
    """The backend that ``prefer_backend`` or the environment asks for; None where neither does.

    Raises:
        UserError: The environment asks for one that cannot run on this machine.
    """
    return _PREFERRED.get() or _from_environment()


@cache
def _from_environment() -> str | None:
    """The environment is read once."""
    name = environ.get("ADACOMCAT_BACKEND")
    if name:
        _require_available(name, "ADACOMCAT_BACKEND: ")
    return name or None


def in_use() -> str | None:
    """The backend that ``use_backend`` asks for; None outside of it."""
    return _FORCED.get()


def compiled_name(op: str, device: str) -> str:
    """The name under which the C++ extension registers the op's kernel for 'cpu' or 'cuda'."""
    return f"{op}_{device}"


def compiled_for(op: str) -> list[str]:
    """The devices for which ``csrc`` has a kernel of the op."""
    return [device for device, ops in (("cpu", CPP_OPS), ("cuda", CUDA_OPS)) if op in ops]


def _compiled(op: str, device: str) -> Kernel:
    return getattr(torch.ops.adacomcat, compiled_name(op, device)).default


def kernel(op: str, x: Tensor, keep_intermediates: bool = True) -> Kernel:
    """The function that runs ``op`` on ``x``, with the signature of the reference."""
    backend = pick(op, x, keep_intermediates)
    if backend in ("cpp", "cuda"):
        extension.follow_precision()
        function = _compiled(op, "cpu" if backend == "cpp" else "cuda")
        if op in DECOMPOSITIONS:
            return function
        return partial(function, keep_intermediates=keep_intermediates)
    if backend == "triton":
        return partial(kernels.load(op).forward, keep_intermediates=keep_intermediates)
    return getattr(reference, op)


def truncation_errors(s: Tensor) -> Tensor:
    """The op on the CUDA backend where that is in use, else the formula.

    Other backends have no such kernel and do not refuse: the op is no work.
    """
    if in_use() != "cuda":
        return reference.truncation_errors(s)
    return kernel("truncation_errors", s)(s)


def backward_kernel(
    op: str, backend: str, grad: Tensor
) -> Callable[..., tuple[Tensor | None, ...]] | None:
    """The function that computes all gradients of ``op`` on ``backend``; None for the formulas.

    The formulas also serve gradients that are traced or batched, which have no memory of their own.
    """
    if type(grad) is not Tensor:
        return None
    if backend == "cpp":
        extension.follow_precision()
        return getattr(autograd_cpu, op)
    return kernels.load(op).backward if backend == "triton" else None


def direct_kernel(op: str, x: Tensor) -> Kernel | None:
    """The kernel for inference where ``pick`` would take one and nothing is traced or transformed.

    It runs without PyTorch's dispatcher in Python, takes ``epsilon`` and ``residual`` if it serves
    a whole sublayer, and keeps the op's contract. GPU kernels are called so only for whole
    sublayers.
    """
    if transforms.watched():
        return None
    if not x.is_cpu:
        if op not in GPU_SUBLAYERS or type(x) is not Tensor:
            return None
        backend = pick(op, x)
        if backend == "triton":
            return _triton_kernel(op)
        return _compiled_kernel(op, "cuda") if backend == "cuda" else None
    asked = _FORCED.get() or preferred()
    if asked not in (None, "cpp") or extension.MISSING or _no_cpp_kernel(op, x):
        return None
    ranked = () if asked else measured.ranked(op, x.device, x.dtype, training=False)
    return _compiled_kernel(op, "cpu") if not ranked or ranked[0] == "cpp" else None


@cache  # small models feel every look-up
def _compiled_kernel(op: str, device: str) -> Kernel:
    """The kernel for 'cpu' or 'cuda'; where it refuses its arguments, the op's contract says why.

    The contract in Python takes longer than a product of single rows, so it runs only after a
    refusal.
    """
    function, contract = _compiled(op, device), getattr(shapes, op)

    def run(*arguments: Any, **sublayer: Any) -> Any:
        extension.follow_precision()
        try:
            return function(*arguments, **sublayer)
        except RuntimeError as error:
            refused = error
        results = contract(*arguments)
        shapes.residual(arguments[0], sublayer.get("residual"), results[0])
        raise refused

    return run


@cache
def _triton_kernel(op: str) -> Kernel:
    contract, forward = getattr(shapes, op), kernels.load(op).forward
    options = {} if op in kernels.FOR_INFERENCE else {"keep_intermediates": False}

    def run(x: Tensor, *arguments: Any, residual: Tensor | None = None,
            epsilon: float | None = None) -> Any:
        shapes.residual(x, residual, contract(x, *arguments)[0])
        return forward(x, *arguments, **options, epsilon=epsilon, residual=residual)

    return run


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run every op inside the ``with`` block on one backend.

    Args:
        name: 'reference', 'cpp', 'triton' or 'cuda'; ``compatible_backends`` lists those that can
            run an op.

    Raises:
        UserError: There is no such backend, or it cannot run on this machine. Inside the block: the
            backend cannot run an op; the message has the reason.
    """
    return _asking(_FORCED, name)


def prefer_backend(name: str) -> AbstractContextManager[None]:
    """The same, but an op that the backend cannot run runs as it would without it.

    ADACOMCAT_BACKEND in the environment asks for it in the whole process.
    """
    return _asking(_PREFERRED, name)


@contextmanager
def _asking(variable: ContextVar[str | None], name: str) -> Iterator[None]:
    _require_available(name)
    token = variable.set(name)
    try:
        yield
    finally:
        variable.reset(token)


def _require_available(name: str, where: str = "") -> None:
    reasons = available()
    if name not in reasons:
        raise UserError(f"{where}unknown backend '{name}'; choose one of {', '.join(reasons)}")
    if reasons[name] is not None:
        raise UserError(f"{where}backend '{name}' is not available here: {reasons[name]}")


def _no_cpp_kernel(op: str, x: Tensor) -> str | None:
    if op not in CPP_OPS:
        return f"it has no C++ kernel; those with one are {', '.join(CPP_OPS)}"
    if not x.is_cpu:
        return f"the kernel runs on the CPU and the input is on {x.device}"
    if op not in DECOMPOSITIONS:
        return refusals.no_dtype(x, KERNEL_DTYPES)
    if op in ("gram", "eigenvalues"):
        if extension.MODULE.build_info()["instruction_set"] == "generic":
            return "the kernel is for AVX2 and AVX512; without them PyTorch's routine is faster"
        return refusals.no_dtype(x, DECOMPOSITION_DTYPES if op == "gram" else (torch.float64,))
    width = min(x.shape[-2:])
    if width > SVD_WIDTH:
        return f"the kernel takes matrices up to {SVD_WIDTH} wide and this one is {width}"
    return refusals.no_dtype(x, DECOMPOSITION_DTYPES)


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
    return refusals.no_dtype(x, KERNEL_DTYPES)


def _no_cuda() -> str | None:
    if extension.MODULE is None:
        return extension.MISSING
    if not extension.MODULE.build_info()["cuda"]:
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
        return refusals.no_dtype(x, KERNEL_DTYPES)
    no_dtype = refusals.no_dtype(x, DECOMPOSITION_DTYPES)
    if no_dtype or op != "batched_svd":
        return no_dtype
    available = gpu.shared_memory_per_block_optin
    return refusals.no_svd(x, SVD_WIDTH, available, extension.MODULE.svd_shared_memory)
