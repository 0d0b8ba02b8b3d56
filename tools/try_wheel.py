"""Tries a wheel of adacomcat as a user without a compiler has it.

    python tools/try_wheel.py dist/adacomcat-*.whl

auditwheel says which Linux the wheel runs on. Then the wheel is installed into an environment of
its own, which takes everything else from this one, and PATH is emptied: the C++ kernels must load,
``doctor`` must find them, and a ViT must be compressed, saved, optimised and run. With --installed
the last part runs in this environment.
"""

import argparse
import os
import site
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# Of PyTorch; the wheel finds them in the process that has imported torch.
EXCLUDED = ("libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libc10.so")
USE = """
import torch, timm, adacomcat
from adacomcat.ops import backends
assert backends.available()["cpp"] is None, backends.available()["cpp"]
model = adacomcat.load("small").eval()
fast, images = adacomcat.optimize(model), torch.rand(2, 3, 64, 64)
with torch.inference_mode():
    difference = (fast(images) - model(images)).abs().max().item()
assert difference < 1e-4, difference
print(f"optimised against plain: {difference:.1e};", adacomcat.__file__)
"""


def use(python: str) -> None:
    """``doctor``, ``compress`` and ``optimize`` in an empty folder, without a PATH."""
    environment = {"PATH": "", "HOME": os.environ.get("HOME", "/")}
    with tempfile.TemporaryDirectory() as folder:
        def run(*arguments: str) -> None:
            subprocess.run([python, *arguments], cwd=folder, env=environment, check=True)

        run("-m", "adacomcat", "doctor")
        run("-m", "adacomcat", "compress", "-m", "vit_tiny_patch16_224", "--img-size", "64",
            "--keep-params", "0.5", "-o", "small")
        run("-c", USE)


def install(wheel: Path, folder: Path) -> str:
    """A Python that has the wheel, and this environment's other packages behind it."""
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    found = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                           capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", found,
                    wheel], check=True)
    # Without this environment's editable install of adacomcat, whose .pth files are not read there.
    Path(found, "others.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    return python


def audit(wheel: Path) -> None:
    excluded = [flag for name in EXCLUDED for flag in ("--exclude", name)]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", folder,
                        wheel], check=True)
        for repaired in Path(folder).iterdir():
            print(f"{repaired.name}: {repaired.stat().st_size / 2**20:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", nargs="?", type=Path)
    parser.add_argument("--installed", action="store_true")
    arguments = parser.parse_args()
    if arguments.installed:
        return use(sys.executable)
    if arguments.wheel is None:
        parser.error("name a wheel, or --installed")
    audit(arguments.wheel)
    with tempfile.TemporaryDirectory() as folder:
        use(install(arguments.wheel, Path(folder)))


if __name__ == "__main__":
    main()
