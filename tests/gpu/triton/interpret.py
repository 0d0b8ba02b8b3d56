"""Runs every ragged case in Triton's interpreter and prints one JSON object of findings.

A process of its own: TRITON_INTERPRET is read when kernels are imported. Arguments: part, parts.
"""

import json
import sys
import warnings
from collections.abc import Callable

import access_checks
import split_k
import strict_interpreter
import torch
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
from kernel_shapes import ragged
from stub_driver import compiling_for

Results = dict[str, torch.Tensor]
# 16-bit tiles are stored in another shape there.
ON_AMD = ("tokens", "odd", "aligned")


def prepared(case: Case | split_k.Parts, dtype_name: str) -> tuple[Callable, Results, Results]:
    """What is to run, what it has to give exactly, and what plain PyTorch gives."""
    dtype, _ = DTYPES[dtype_name]
    if isinstance(case, split_k.Parts):
        arguments = split_k.draw(case, dtype)
        return lambda: split_k.run_kernels(*arguments), *split_k.oracles(dtype_name, *arguments)
    arguments = draw(case, dtype)
    grad = incoming(case, arguments)
    expected = oracles(case, dtype_name, arguments, grad)
    return lambda: run_kernels(case, arguments, grad), *expected


def findings(part: int, count: int) -> dict[str, list[str]]:
    """Case and type → what is wrong with it; "KERNEL PART" → the cases that it ran in."""
    found: dict[str, list[str]] = {}
    for i, case in enumerate([*ragged(), *split_k.RAGGED]):
        if i % count != part:
            continue
        kernels: set[str] = set()
        types = [(dtype_name, "sm_80") for dtype_name in DTYPES]
        types += [("fp16", "gfx942")] if case.id.endswith(ON_AMD) else []
        for dtype_name, architecture in types:
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
            found.setdefault(f"{kernel} {part}", []).append(case.id)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    # New tensors hold NaN, so that nothing passes by not being written.
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    strict_interpreter.install()
    access_checks.install()
    print(json.dumps(findings(int(sys.argv[1]), int(sys.argv[2]))))
