"""Runs kernels with one fault each in the strict interpreter, and prints its complaints as JSON.

test_interpreter.py starts it with TRITON_INTERPRET=1.
"""

import json
from collections.abc import Callable
from typing import Any

import access_checks
import strict_interpreter
import torch
import triton
import triton.language as tl
from stub_driver import compiling_for


@triton.jit
def copy_kernel(a_ptr, out_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr):
    """Copies n elements; correct if STEP equals BLOCK and LIMIT is 0."""
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(a_ptr + i, mask=i < n + LIMIT), mask=i < n)


@triton.jit
def shift_kernel(a_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(a_ptr + i, tl.load(a_ptr + i + 1, mask=i + 1 < n), mask=i < n)


@triton.jit
def collide_kernel(out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i // 2, i.to(tl.float32))


@triton.jit
def product_kernel(a_ptr, out_ptr):
    i = tl.arange(0, 8)
    a = tl.load(a_ptr + i[:, None] * 8 + i[None, :])
    tl.store(out_ptr + i[:, None] * 8 + i[None, :], tl.dot(a, a))


@triton.jit
def turn_kernel(a_ptr, sin_ptr, out_ptr, n, PREFIX: tl.constexpr, BLOCK: tl.constexpr):
    """Multiplies all but the first tokens by their angle's sine, which is read for those too."""
    i = tl.arange(0, BLOCK)
    a, sin = tl.load(a_ptr + i, mask=i < n), tl.load(sin_ptr + i - PREFIX, mask=i < n)
    tl.store(out_ptr + i, tl.where(i < PREFIX, a, a * sin), mask=i < n)


@triton.jit
def bfloat16_kernel(a_ptr, b_ptr, sum_ptr, product_ptr, larger_ptr, rounded_ptr, f_ptr, n,
                    BLOCK: tl.constexpr):  # fmt: skip
    i = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + i, mask=i < n), tl.load(b_ptr + i, mask=i < n)
    tl.store(sum_ptr + i, a + b, mask=i < n)
    tl.store(product_ptr + i, a * b, mask=i < n)
    tl.store(larger_ptr + i, tl.maximum(a, -b), mask=i < n)
    tl.store(rounded_ptr + i, tl.load(f_ptr + i, mask=i < n).to(tl.bfloat16), mask=i < n)


def complaint(run: Callable[[], object]) -> str:
    """The complaint of the access checks about a launch; empty if there is none."""
    try:
        with compiling_for("sm_80"), access_checks.checked(seed=1) as launches:
            run()
    except Exception as error:  # the interpreter wraps what a kernel raises
        return f"{error} {error.__cause__ or ''}"
    return "".join(f"not written: {name}" for name in launches.unwritten)


def bfloat16_differences() -> str:
    f = torch.randn(250)
    a, b = torch.randn(250).bfloat16(), torch.randn(250).bfloat16()
    outs = [torch.empty_like(a) for _ in range(4)]
    with compiling_for("sm_80"):
        bfloat16_kernel[(1,)](a, b, *outs, f, 250, BLOCK=256)
    wanted = [a + b, a * b, torch.maximum(a, -b), f.bfloat16()]
    return "" if all(map(torch.equal, outs, wanted)) else "differs"


def main() -> dict[str, str]:
    a, out = torch.randn(100), torch.empty(100)
    rows = torch.randn(4, 40)[:, :24]
    copy: Any = copy_kernel
    return {
        "reads_past_the_end": complaint(lambda: copy[(2,)](a, out, 100, 64, 64, 28)),
        "reads_before_the_start": complaint(
            lambda: turn_kernel[(1,)](a, torch.randn(96), out, 100, 4, 128)
        ),
        "programs_overlap": complaint(lambda: copy[(2,)](a, out, 100, 32, 64, 0)),
        "reads_a_neighbour": complaint(lambda: shift_kernel[(2,)](a, 100, 64)),
        "reads_between_rows": complaint(lambda: copy[(4,)](rows, out, 128, 32, 32, 0)),
        "lanes_collide": complaint(lambda: collide_kernel[(1,)](out, 64)),
        "leaves_a_hole": complaint(lambda: copy[(1,)](a, out, 100, 64, 64, 0)),
        "product_too_small": complaint(
            lambda: product_kernel[(1,)](torch.ones(8, 8).half(), torch.ones(8, 8))
        ),
        "none": complaint(lambda: copy[(2,)](a, out, 100, 64, 64, 0)),
        "bfloat16": bfloat16_differences(),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    strict_interpreter.install()
    access_checks.install()
    print(json.dumps(main()))
