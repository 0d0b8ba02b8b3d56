"""The installed package: the extension fits this torch, imports stay light, the parts are there."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from adacomcat.ops import backends

ROOT = Path(__file__).parents[2]


def run_python(program: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.skipif(
    os.environ.get("ADACOMCAT_NO_EXT", "0") not in ("", "0"), reason="installed without extension"
)
def test_extension_was_built_against_this_torch() -> None:
    info = backends.build_info()
    assert info is not None, backends.available()["cpp"]
    assert info["torch"] == torch.__version__.split("+")[0]
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert isinstance(info["cuda"], bool)
    features = info["cpu_features"]
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2":
        assert features["avx2"]
    if capability == "AVX512":
        assert features["avx512f"]


def test_extension_needs_the_stable_abi_alone() -> None:
    """No symbol of C++ PyTorch, so that the binary serves other torch versions than its own."""
    found = importlib.util.find_spec("adacomcat._C")
    if found is None or found.origin is None or shutil.which("nm") is None:
        pytest.skip("no extension, or no nm")
    wanted = subprocess.run(["nm", "-D", "--undefined-only", found.origin], capture_output=True,
                            text=True, check=True).stdout
    assert "aoti_torch_get_sizes" in wanted
    unstable = [line.split()[-1] for line in wanted.splitlines()
                if re.match(r"_Z\w*?(2at|3c10|5torch)\d", line.split()[-1])]
    assert unstable == []


def test_import_is_light() -> None:
    program = (
        "import sys, adacomcat; "
        "print([m for m in ('torch', 'timm', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    assert run_python(program).strip() == "[]"


def test_adapters_are_imported_without_diffusers() -> None:
    program = (
        "import sys, adacomcat.customize; "
        "print([m for m in ('diffusers', 'transformers', 'peft') if m in sys.modules])"
    )
    assert run_python(program).strip() == "[]"


def test_kernels_import_neither_adacomcat_ops_nor_timm() -> None:
    program = (
        "import sys, adacomcat.kernels; "
        "print([m for m in ('timm', 'adacomcat.ops') if m in sys.modules])"
    )
    assert run_python(program).strip() == "[]"


def test_metadata_and_command() -> None:
    dependencies = " ".join(metadata.requires("adacomcat") or [])
    for name in ("torch", "timm", "safetensors", "PyYAML", "scikit-learn", "wrapt", "triton"):
        assert name.lower() in dependencies.lower()
    commands = metadata.entry_points(group="console_scripts", name="adacomcat")
    assert [c.value for c in commands] == ["adacomcat.cli:main"]


def setup_arguments(**environment: str) -> str:
    """What setup.py prints and builds, without building."""
    program = f"""
import os, setuptools
os.chdir({str(ROOT)!r})
seen = {{}}
setuptools.setup = lambda **arguments: seen.update(arguments)
exec(compile(open("setup.py").read(), os.path.abspath("setup.py"), "exec"),
     {{"__name__": "__main__", "__file__": os.path.abspath("setup.py")}})
print(sorted(seen["packages"])[:1], "adacomcat.kernels" in seen["packages"],
      [e.name for e in seen.get("ext_modules", [])])
"""
    return run_python(program, **environment)


def test_setup_builds_the_extension_unless_told_not_to() -> None:
    assert setup_arguments(ADACOMCAT_NO_EXT="0").endswith(
        "['adacomcat'] True ['adacomcat._C']\n"
    )
    without = setup_arguments(ADACOMCAT_NO_EXT="1")
    assert "installing without the C++ extension" in without
    assert without.endswith("['adacomcat'] True []\n")


@pytest.mark.parametrize("compiler", ["", "no-such-compiler -O2"])
def test_setup_installs_without_a_compiler(compiler: str, tmp_path: Path) -> None:
    told, packages = setup_arguments(CXX=compiler, PATH=str(tmp_path),
                                     ADACOMCAT_NO_EXT="0").splitlines()
    assert "there is no C++ compiler" in told and "install g++" in told
    assert packages == "['adacomcat'] True []"


def test_native_sources_do_not_depend_on_the_build_machine() -> None:
    assert "march=native" not in (ROOT / "setup.py").read_text()
