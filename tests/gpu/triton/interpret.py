"""Runs the ragged cases in Triton's interpreter and prints one JSON object of findings.

test_interpreter.py starts it with TRITON_INTERPRET=1, which Triton reads when kernels are imported.
The arguments are the index of this process and the number of processes, which share the cases.
"""

import json
import sys
import warnings
from collections.abc import Callable

import access_checks
import split_k
import strict_interpreter
import torch
from interpreted import CASES, types_of
from kernel_cases import (
    DTYPES,
    UNITS,
    Case,
    draw,
    incoming,
    oracles,
    precision,
    run_kernels,
    worst,
)
from stub_driver import compiling_for

Results = dict[str, torch.Tensor]


def prepared(case: Case | split_k.Splits, dtype_name: str) -> tuple[Callable, Results, Results]:
    """The call to run, its exact results, and those of the formula in its dtype."""
    dtype, _ = DTYPES[dtype_name]
    if isinstance(case, split_k.Splits):
        arguments = split_k.draw(case, dtype)
        return lambda: split_k.run_kernels(*arguments), *split_k.oracles(dtype_name, *arguments)
    arguments = draw(case, dtype)
    grad = incoming(case, arguments)
    expected = oracles(case, dtype_name, arguments, grad)
    return lambda: run_kernels(case, arguments, grad), *expected


def findings(process: int, count: int) -> dict[str, list[str]]:
    """Complaints by case, dtype and architecture; cases by "KERNEL PROCESS" in which it ran."""
    found: dict[str, list[str]] = {}
    for i, case in enumerate(CASES):
        if i % count != process:
            continue
        kernels: set[str] = set()
        for dtype_name, architecture in types_of(i):
            run, exact, plain = prepared(case, dtype_name)
            try:
                with (
                    precision(DTYPES[dtype_name][1]),
                    compiling_for(architecture),
                    access_checks.checked(seed=i) as launches,
                ):
                    actual = run()
                complaints = worst(actual, exact, plain, UNITS[dtype_name])
                complaints += [f"not written: {name}" for name in launches.unwritten]
                kernels |= launches.kernels
            except Exception as error:  # reported as this case's finding
                complaints = [f"{type(error).__name__}: {error} {error.__cause__ or ''}"]
            found[f"{case.id}-{dtype_name}-{architecture}"] = complaints
        for kernel in kernels:
            found.setdefault(f"{kernel} {process}", []).append(case.id)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Fills new tensors with NaN, so that outputs that are not written fail.
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    strict_interpreter.install()
    access_checks.install()
    print(json.dumps(findings(int(sys.argv[1]), int(sys.argv[2]))))
