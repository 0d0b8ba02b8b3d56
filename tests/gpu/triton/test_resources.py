"""Static budgets: what every kernel may take on each architecture at the shapes of DeiT-S."""

from functools import partial

import pytest
import torch
from gpu_resources import MULTIPROCESSOR, Resources, compile_all, measure, measured
from kernel_cases import DTYPES, draw, incoming, precision, run_kernels
from kernel_shapes import DEIT, vision
from ptx.mutations import ALL_MUTANTS
from stub_driver import TARGETS

from adacomcat.kernels import load
from adacomcat.kernels.reductions import weight_and_bias_grads

ARITHMETIC_ONLY = ("sum_splits_kernel", "row_sum_kernel", "layer_norm_kernel")


# Most of the time goes to the compiler; the other architectures are for `make mutants`.
BUDGETS = [(name, 64) for name in TARGETS] + [(name, 2) for name in ("sm_80", "sm_90")]
TF32 = [name for name in TARGETS if name.startswith("sm")]
if not ALL_MUTANTS:
    BUDGETS, TF32 = [("sm_90", 64), ("gfx942", 64), ("sm_80", 2)], ["sm_80"]


@pytest.mark.parametrize("architecture, images", BUDGETS)
def test_budgets(architecture: str, images: int) -> None:
    """For 64 images, whose tiles are the largest, and for two, whose tiles are small everywhere."""
    kernels = measured(architecture, "fp16", images=images)
    assert not [k for k in kernels if k.spilled]
    assert not [k for k in kernels if k.kernel not in ARITHMETIC_ONLY and k.tensor_core == 0]
    assert not [k for k in kernels if k.narrow]
    for kernel in kernels:
        assert_room(kernel)


def assert_room(k: Resources) -> None:
    """Eight warps on a multiprocessor, so that some compute while others wait; on sm_89, whose
    shared memory is small, four.
    """
    if k.architecture.startswith("gfx"):
        assert k.shared <= 65536 and k.registers <= 512, k  # vector and accumulation registers
        return
    least = 4 if k.architecture == "sm_89" else 8
    assert k.shared <= MULTIPROCESSOR[int(k.architecture[3:])][4], k
    assert k.registers <= 255 and k.blocks is not None and k.blocks * k.warps >= least, k


@pytest.mark.parametrize("architecture", TF32)
def test_tf32_products_move_128_bits_at_a_time_and_spill_nothing(architecture: str) -> None:
    """Also those that are transposed, which tensor cores do not do: of 64 images all ways occur."""
    assert not [k for k in measured(architecture, "tf32", images=64) if k.narrow or k.spilled]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_types_are_within_their_budget(architecture: str, dtype: str) -> None:
    case = vision("deit_b", 394)[2]
    arguments = draw(case, DTYPES[dtype][0])
    most = 65536 if architecture == "gfx942" else MULTIPROCESSOR[int(architecture[3:])][4]
    for name, compiled in compile_all(architecture, lambda: load(case.op).forward(*arguments)):
        taken = measure(name, compiled, architecture, dtype)
        assert taken.shared <= most and not taken.spilled and not taken.narrow, taken


@pytest.mark.parametrize("architecture, model", [("sm_80", "deit_s"), ("sm_89", "deit_b")])
def test_exact_products_are_not_spilled(architecture: str, model: str) -> None:
    """All kernels of the MLP, forward and backward, in which most is alive at once."""
    case = vision(model, 394)[2]
    arguments = draw(case, torch.float32)
    run = partial(run_kernels, case, arguments, incoming(case, arguments))
    for name, compiled in compile_all(architecture, run):
        taken = measure(name, compiled, architecture, "fp32")
        assert not taken.spilled and not taken.narrow, taken


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_tiles_of_128_rows_of_a_wide_rank_are_not_spilled(architecture: str) -> None:
    """Of DeiT-B's linear and MLP, which take twice the registers of DeiT-S's."""
    for case in vision("deit_b", 64 * 197)[::2]:
        arguments = draw(case, torch.float16)
        run = partial(load(case.op).forward, *arguments)
        for name, compiled in compile_all(architecture, run):
            taken = measure(name, compiled, architecture, "fp16")
            assert taken.tensor_core and not taken.spilled and not taken.narrow, taken


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_many_rows_are_not_spilled(architecture: str) -> None:
    """The backward pass of the MLP, which keeps most, where tiles are the largest."""
    case = vision("deit_s", 64 * 197)[2]
    arguments = draw(case, torch.float16)
    middle = torch.empty(64 * 197, case.sizes["r1"], dtype=torch.float16)
    compiled = dict(compile_all(architecture, lambda: load(case.op).backward(
        incoming(case, arguments), *arguments, middle, None, needs=[True] * 5 + [False] * 2)))
    name = "low_rank_mlp_backward_kernel"
    taken = measure(name, compiled[name], architecture, "fp16")
    assert taken.tensor_core and not taken.spilled and not taken.narrow, taken


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("dtype, model", [("fp32", "deit_s"), ("tf32", "deit_s"),
                                          ("fp16", "deit_b")])
def test_gradients_are_read_128_bits_at_a_time(dtype: str, model: str, architecture: str) -> None:
    """The gradient of an activation's input reads a tile as rows and multiplies it as columns."""
    (kind, setting), (d, r, _) = DTYPES[dtype], DEIT[model]
    shapes = ((394, d), (394, r), (d, r), (d,))
    grad, middle, u, bias = (torch.empty(shape, dtype=kind) for shape in shapes)
    with precision(setting):
        compiled = dict(compile_all(architecture, lambda: weight_and_bias_grads(
            grad, middle, u, bias, "gelu", (True, True))))
    name = "weight_and_bias_grads_kernel"
    taken = measure(name, compiled[name], architecture, dtype)
    assert not taken.narrow and not taken.spilled, taken
