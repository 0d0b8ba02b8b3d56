"""Builds adacomcat._C against the torch that is already installed in this environment.

Without torch, without a C++ compiler, on other systems than Linux, or with ADACOMCAT_NO_EXT=1,
adacomcat installs without the extension and says so.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# The extension uses PyTorch's stable ABI as of 2.10: what is built with one torch serves others.
LEAST_TORCH = (2, 10)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# A kernel that spills registers does not get through.
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xptxas=--warn-on-spills", "-Xptxas=-Werror"]


def find_torch() -> str | None:
    """torch's version, also from inside pip's isolated build environment; None without torch."""
    # Isolation hides site-packages, but sys.prefix is still the environment's own.
    names = {"base": sys.prefix, "platbase": sys.prefix}
    for key in ("purelib", "platlib"):
        path = sysconfig.get_path(key, vars=names)
        if path not in sys.path:
            sys.path.append(path)
    try:
        from torch import version
    except ImportError:
        return None
    return version.__version__


def find_cuda_home() -> str | None:
    """The root of the CUDA toolkit; an nvcc on the path may be a wrapper, so nvcc is asked."""
    from torch.utils.cpp_extension import CUDA_HOME

    candidates = [Path(CUDA_HOME) / "bin" / "nvcc"] if CUDA_HOME else []
    for nvcc in (*candidates, "nvcc"):
        try:
            dry_run = subprocess.run(
                [nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False
            )
        except OSError:
            continue
        top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
        if top:
            return str(Path(top.group(1).strip()).resolve())
    return None


def ask_nvcc(home: str, flag: str) -> str:
    nvcc = Path(home) / "bin" / "nvcc"
    return subprocess.run([nvcc, flag], capture_output=True, text=True, check=False).stdout


def use_cuda(sources: list[str]) -> bool:
    """Whether to compile CUDA: sources, a CUDA torch, its toolkit; a visible GPU is no matter."""
    if not sources or os.environ.get("ADACOMCAT_NO_CUDA", "0") not in ("", "0"):
        return False
    import torch
    from torch.utils import cpp_extension

    wanted = torch.version.cuda
    home = find_cuda_home() if wanted else None
    if wanted is None or home is None:
        return False
    release = re.search(r"release (\d+)", ask_nvcc(home, "--version"))
    if not release or release[1] != wanted.split(".")[0]:
        print(f"adacomcat: nvcc is not of CUDA {wanted}, torch's: no CUDA kernels")
        return False
    known = ask_nvcc(home, "--list-gpu-arch").split()
    names = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(names) + "+PTX")
    cpp_extension.CUDA_HOME = home
    return True


def find_compiler() -> bool:
    """Whether there is a C++ compiler: that of CXX, or the usual names."""
    named = shlex.split(os.environ.get("CXX", ""))
    return any(shutil.which(name) for name in (named[:1] or ["c++", "g++", "clang++"]))


def why_without_extension() -> str | None:
    """What keeps the extension from being built, and the mend; None where nothing does."""
    if os.environ.get("ADACOMCAT_NO_EXT", "0") not in ("", "0"):
        return "ADACOMCAT_NO_EXT is set"
    if sys.platform != "linux":
        return "its CPU kernels are built on Linux only; Triton and PyTorch compute in their place"
    if not find_compiler():
        return ("there is no C++ compiler; Triton and PyTorch compute in the place of the CPU "
                "kernels. To get them, install g++ 11 or later, then adacomcat again")
    found = find_torch()
    if found is None:
        return ("no torch in this environment. To get it, install torch first, then adacomcat "
                "again")
    if tuple(map(int, found.split(".")[:2])) < LEAST_TORCH:
        return f"torch is {found}; the extension needs {'.'.join(map(str, LEAST_TORCH))} or later"
    return None


def extension_arguments() -> dict[str, Any]:
    """What setup() needs to build the extension; nothing where there is none to build."""
    if (reason := why_without_extension()) is not None:
        print(f"adacomcat: installing without the C++ extension: {reason}.")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    def found(*patterns: str) -> list[str]:
        return sorted(str(p.relative_to(ROOT)) for q in patterns for p in ROOT.glob(q))

    sources = found("csrc/*.cpp", "csrc/common/*.cpp", "csrc/cpu/**/*.cpp")
    cuda_sources = found("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
    include_dirs = [str(ROOT / "csrc")]
    # No errno and no traps, as torch itself is built: else square roots are not vectorised.
    # g++ 12 warns of the inside of its own AVX-512 intrinsics.
    flags = ["-std=c++20", "-O3", TORCH_TARGET, "-fvisibility=hidden", "-fno-math-errno",
             "-fno-trapping-math", "-Wno-maybe-uninitialized"]
    link = []
    if "-g" not in os.environ.get("CFLAGS", ""):
        # Python's own flags ask for debug symbols: six times the size, and a longer build.
        flags, link = [*flags, "-g0"], ["-s"]
    if use_cuda(cuda_sources):
        # USE_CUDA: the stable ABI then declares the current stream.
        flags = [*flags, "-DADACOMCAT_CUDA", "-DUSE_CUDA"]
        extension = CUDAExtension(
            "adacomcat._C",
            [*sources, *cuda_sources],
            include_dirs=include_dirs,
            extra_compile_args={"cxx": flags, "nvcc": NVCC_FLAGS},
            extra_link_args=link,
        )
    else:
        extension = CppExtension("adacomcat._C", sources, include_dirs=include_dirs,
                                 extra_compile_args={"cxx": flags}, extra_link_args=link)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    packages=[*find_packages(include=["adacomcat", "adacomcat.*"]), "adacomcat.kernels"],
    package_dir={"adacomcat.kernels": "kernels"},
    **extension_arguments(),
)
