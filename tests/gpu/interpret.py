"""Runs every ragged case in Triton's interpreter and prints one JSON object of findings.

A process of its own: TRITON_INTERPRET is read when kernels are imported. Arguments: part, parts.
"""

import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import access_checks  # noqa: E402
import strict_interpreter  # noqa: E402
import torch  # noqa: E402
from cases import DTYPES, UNITS, draw, incoming, oracles, precision, run_kernels, worst  # noqa: E402
from shapes import ragged  # noqa: E402
from stub_driver import compiling_for  # noqa: E402


def findings(part: int, parts: int) -> dict[str, list[str]]:
    """Case and type → what is wrong with it; "kernels PART" → the kernels that ran."""
    found: dict[str, list[str]] = {}
    kernels: set[str] = set()
    for i, case in enumerate(ragged()):
        for dtype_name, (dtype, setting) in DTYPES.items():
            if i % parts != part:
                continue
            arguments = draw(case, dtype)
            grad = incoming(case, arguments)
            exact, plain = oracles(case, dtype_name, arguments, grad)
            try:
                with (
                    precision(setting),
                    compiling_for("sm_80"),
                    access_checks.checked(seed=i) as launches,
                ):
                    actual = run_kernels(case, arguments, grad)
                complaints = worst(actual, exact, plain, UNITS[dtype_name])
                complaints += [f"not written: {name}" for name in launches.unwritten]
                kernels |= launches.kernels
            except Exception as error:  # reported as this case's finding
                complaints = [f"{type(error).__name__}: {error} {error.__cause__ or ''}"]
            found[f"{case.id}-{dtype_name}"] = complaints
    return found | {f"kernels {part}": sorted(kernels)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    # New tensors hold NaN, so that nothing passes by not being written.
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    strict_interpreter.install()
    access_checks.install()
    print(json.dumps(findings(int(sys.argv[1]), int(sys.argv[2]))))
