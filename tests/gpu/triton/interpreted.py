"""What runs in the interpreter: every case, in float16 or another type of operands in turn."""

import split_k
from kernel_cases import Case
from kernel_shapes import ragged
from ptx.mutations import ALL_MUTANTS

CASES: list[Case | split_k.Splits] = [*ragged(), *split_k.RAGGED]
# Cases that also run as on AMD, where store_tile reshapes 16-bit tiles.
ON_AMD = ("tokens", "odd", "aligned")


def types_of(number: int) -> list[tuple[str, str]]:
    """The types and architectures of case `number`; the emulator runs all types."""
    types = [(name, "sm_80") for name in ("fp16", ("bf16", "fp32", "tf32")[number // 2 % 3])]
    if not ALL_MUTANTS:
        types = [types[number % 2]]
    return types + [("fp16", "gfx942")] * CASES[number].id.endswith(ON_AMD)
