"""What runs in the interpreter: every case, in float16 and in one other type of operands."""

import split_k
from kernel_cases import Case
from kernel_shapes import ragged

CASES: list[Case | split_k.Splits] = [*ragged(), *split_k.RAGGED]
# Cases that also run as on AMD, where store_tile reshapes 16-bit tiles.
ON_AMD = ("tokens", "odd", "aligned")


def types_of(number: int) -> list[tuple[str, str]]:
    """The types and architectures of case `number`; the emulator runs all types."""
    types = [("fp16", "sm_80"), (("bf16", "fp32", "tf32")[number % 3], "sm_80")]
    return types + [("fp16", "gfx942")] * CASES[number].id.endswith(ON_AMD)
