"""Builds adacomcat._C against the torch that is already installed in this environment.

Without torch, or with ADACOMCAT_NO_EXT=1, adacomcat installs without the extension.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0+PTX"


def find_torch() -> bool:
    """Whether torch imports, also from inside pip's isolated build environment."""
    # Isolation hides site-packages, but sys.prefix is still the environment's own.
    names = {"base": sys.prefix, "platbase": sys.prefix}
    for key in ("purelib", "platlib"):
        path = sysconfig.get_path(key, vars=names)
        if path not in sys.path:
            sys.path.append(path)
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


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


def use_cuda(sources: list[str]) -> bool:
    """Whether to compile CUDA: sources, a CUDA torch and a toolkit; a visible GPU is no matter."""
    if not sources:
        return False
    import torch
    from torch.utils import cpp_extension

    home = find_cuda_home() if torch.version.cuda else None
    if home is None:
        return False
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    cpp_extension.CUDA_HOME = home
    return True


def extension_arguments() -> dict[str, Any]:
    """What setup() needs to build the extension; nothing where there is none to build."""
    if os.environ.get("ADACOMCAT_NO_EXT", "0") not in ("", "0"):
        print("adacomcat: ADACOMCAT_NO_EXT is set, installing without the C++ extension")
        return {}
    if not find_torch():
        print(
            "adacomcat: no torch in this environment, installing without the C++ extension. "
            "To get it, install torch first, then adacomcat again."
        )
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp"))
    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
    # No errno and no traps, as torch itself is built: else square roots are not vectorised.
    flags = ["-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    if use_cuda(cuda_sources):
        flags = [*flags, "-DADACOMCAT_CUDA"]
        extension = CUDAExtension(
            "adacomcat._C",
            [*sources, *cuda_sources],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-DADACOMCAT_CUDA"]},
        )
    else:
        extension = CppExtension("adacomcat._C", sources, extra_compile_args={"cxx": flags})
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    packages=[*find_packages(include=["adacomcat", "adacomcat.*"]), "adacomcat.kernels"],
    package_dir={"adacomcat.kernels": "kernels"},
    **extension_arguments(),
)
