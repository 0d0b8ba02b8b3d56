"""The instruction sets that tests can run the C++ kernels on: this CPU's, and AMX in software."""

import ctypes
import functools
import importlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from adacomcat.ops import backends

NAMES = ("generic", "avx2", "avx_vnni", "avx512", "avx512_bf16", "avx512_vnni", "amx")


@functools.cache
def here() -> str:
    """The instruction set that the extension chose; the test is skipped where there is none."""
    reason = backends.available()["cpp"]
    if reason is not None:
        pytest.skip(reason)
    return backends.build_info()["instruction_set"]


@functools.cache
def emulator() -> ctypes.CDLL | None:
    """amx_emulator.cpp, built; None where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    source = Path(__file__).with_name("amx_emulator.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "amx_emulator.so"
        flags = ["-O3", "-mavx512f", "-mxsave", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-o", library, source], check=True)
        return ctypes.CDLL(str(library))


@functools.cache
def software_amx() -> bool:
    """Whether AMX is computed in software from now on."""
    if not runs_avx512_bf16():
        return False
    emulator().install()
    return True


@functools.cache
def runs_avx512_bf16() -> bool:
    """Also where a virtual machine does not show it."""
    if use("avx512_bf16", emulated=False):
        return True
    has_avx512 = use("avx512")
    return has_avx512 and emulator() is not None and bool(emulator().runs_avx512_bf16())


def use(name: str, emulated: bool = True) -> bool:
    """Takes an instruction set; False where this CPU has none such and nothing stands in for it."""
    here()
    extension = importlib.import_module("adacomcat._C")
    if extension.use_instruction_set(name):
        return True
    stands_in = {"amx": software_amx, "avx512_bf16": runs_avx512_bf16}.get(name)
    return (emulated and stands_in is not None and stands_in()
            and extension.use_instruction_set(name, emulated=True))


@functools.cache
def lacking(name: str) -> bool:
    """Whether nothing here runs this instruction set; the one in use stays in use."""
    before = here()
    found = use(name)
    use(before)
    return not found
