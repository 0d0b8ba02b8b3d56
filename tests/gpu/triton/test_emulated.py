"""Every kernel's PTX for sm_80 and sm_90, executed by the emulator.

The tests check errors against float64, and fail on accesses out of bounds or of uninitialised
memory and on races between threads, those of asynchronous copies and products included.
"""

from collections.abc import Iterator

import pytest
import split_k
import torch
from kernel_cases import DTYPES, UNITS, Case, draw, incoming, oracles, precision, run_kernels, worst
from kernel_shapes import DEIT, ragged, vision
from ptx.emulate import Launch, emulated
from ptx.mutations import ALL_MUTANTS

from adacomcat import ops
from adacomcat.kernels import FOR_INFERENCE, load, tiles
from adacomcat.kernels.reductions import sum_splits
from adacomcat.ops import backends

ARCHITECTURES = ("sm_80", "sm_90")
# Some ragged cases; the interpreter has all of them. Most of the time goes to the compiler.
SOME = {"fp16": ("odd",), "bf16": ("rank-1", "additive", "keys"), "tf32": (),
        "fp32": ("wide-rank", "wide-ranks")}
if ALL_MUTANTS:
    SOME = {dtype: (*names, "odd") for dtype, names in SOME.items()}
RAGGED = [(case, dtype) for case in ragged() for dtype in DTYPES
          if case.name in SOME[dtype] and case.op not in FOR_INFERENCE]
# Ops for inference alone run as sublayers; each of these cases on one of the architectures.
SOME_FOR_INFERENCE = {"fp16": ("odd", "dense-up"), "bf16": ("keys",), "tf32": ("odd",)}
INFERENCE = [(case, dtype) for case in ragged() for dtype in DTYPES if case.op in FOR_INFERENCE
             and (ALL_MUTANTS or case.sublayer and case.name in SOME_FOR_INFERENCE.get(dtype, ()))]
VISION = [case for model in DEIT for tokens in (197, 394) for case in vision(model, tokens)]


def in_turn(turn: int) -> list[Case]:
    """One size of each op: another on each architecture; `make mutants` runs all of them.

    Ops for inference alone run low-rank on one architecture, and dense on the other.
    """
    names = [f"{model}-{tokens}" for tokens in (394, 197) for model in ("deit_s", "deit_b")]
    ops = list(dict.fromkeys((case.op, case.sublayer) for case in VISION))
    return [case for case in VISION if ALL_MUTANTS or (
        case.name == "deit_s-197" and case.sublayer != bool(turn) if case.op in FOR_INFERENCE
        else case.name == names[(ops.index((case.op, case.sublayer)) + turn) % len(names)])]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill new tensors with NaN, so that outputs that are not written fail."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(
    case: Case, architecture: str, dtype_name: str, tile: tiles.Tile | None = None
) -> list[Launch]:
    """Emulate the case, compare all its results, and return the launches."""
    dtype, setting = DTYPES[dtype_name]
    arguments = draw(case, dtype)
    grad = incoming(case, arguments)
    exact, plain = oracles(case, dtype_name, arguments, grad)
    with precision(setting), emulated(architecture) as launches:
        actual = run_kernels(case, arguments, grad, tile)
    assert worst(actual, exact, plain, UNITS[dtype_name]) == []
    return launches


@pytest.mark.parametrize("case, dtype, architecture", [
    (case, dtype, architecture) for at, (case, dtype) in enumerate(RAGGED)
    for number, architecture in enumerate(ARCHITECTURES) if ALL_MUTANTS or number == at % 2
], ids=lambda v: getattr(v, "id", v))
def test_ragged(case: Case, dtype: str, architecture: str) -> None:
    run(case, architecture, dtype)


@pytest.mark.parametrize("case, dtype, architecture", [
    (case, dtype, architecture) for at, (case, dtype) in enumerate(INFERENCE)
    for number, architecture in enumerate(ARCHITECTURES) if ALL_MUTANTS or number == at % 2
], ids=lambda v: getattr(v, "id", v))
def test_ragged_for_inference(case: Case, dtype: str, architecture: str) -> None:
    run(case, architecture, dtype)


MIXED = [Case("low_rank_mlp", f"mixed-{r1}-{r2}",
              dict(lead=(150,), d=64, r1=r1, hidden=128, r2=r2, out=40), {"ACTIVATION": "gelu"})
         for r1, r2 in ((24, 32), (32, 24))]
ODD = [case for case in ragged()
       if case.name == "odd" and (ALL_MUTANTS or case.op not in FOR_INFERENCE)]


@pytest.mark.parametrize(
    "case, dtype", [*((c, "fp16") for c in MIXED[:: 1 if ALL_MUTANTS else 2]),
                    *((c, "tf32") for c in [*MIXED, *ODD][:: 1 if ALL_MUTANTS else 3])],
    ids=lambda v: getattr(v, "id", v),
)
def test_large_tiles_on_sm_90(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """wgmma with factors of different alignment, and with tf32."""
    monkeypatch.setattr(tiles, "multiprocessors", lambda: 1)
    run(case, "sm_90", dtype)


@pytest.mark.parametrize("op, architecture", [
    (op, architecture)
    for at, op in enumerate(("low_rank_linear", "low_rank_mlp", "low_rank_attention"))
    for number, architecture in enumerate(ARCHITECTURES) if ALL_MUTANTS or number != at % 2 and at])
def test_tf32_products_of_large_tiles(
    op: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands of tf32 that are copied several stages ahead and then transposed."""
    monkeypatch.setattr(tiles, "multiprocessors", lambda: 1)
    case = next(case for case in VISION if case.id == f"{op}-deit_s-197")
    run(case, architecture, "tf32")


@pytest.mark.parametrize("case", in_turn(0), ids=lambda case: case.id)
def test_vision_transformer_on_sm_80(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image, and two images on 4 multiprocessors, which gives the tiles of large batches."""
    if case.name.endswith("394"):
        monkeypatch.setattr(tiles, "multiprocessors", lambda: 4)
    run(case, "sm_80", "fp16")


@pytest.mark.parametrize("case", in_turn(1), ids=lambda case: case.id)
def test_vision_transformer_on_sm_90_with_wgmma(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a single multiprocessor, which gives the tiles of large batches to one image too."""
    monkeypatch.setattr(tiles, "multiprocessors", lambda: 1)
    launches = run(case, "sm_90", "fp16")
    # The other reductions have fewer than the 64 rows of a wgmma at rank 256.
    names = ("low_rank", "attention", "project", "matmul_sum", "weight_grad_kernel", "gated",
             "rotary")
    for launch in launches:
        if launch.name.startswith(names):
            assert any(i.parts[0] == "wgmma" for i in launch.kernel.code), launch.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", split_k.VISION, ids=lambda case: case.id)
def test_split_k_of_a_vision_transformer(case: split_k.Splits, architecture: str) -> None:
    """The cases above reach these two kernels on sm_80 only."""
    arguments = split_k.draw(case, torch.float16)
    with emulated(architecture) as launches:
        actual = split_k.run_kernels(*arguments)
    assert {launch.name for launch in launches} == {"expand_splits_kernel", "sum_splits_kernel"}
    assert worst(actual, *split_k.oracles("fp16", *arguments), UNITS["fp16"]) == []


def test_the_ops_run_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """`use_backend` and autograd reach the launchers, and the emulated PTX gives the gradients."""
    monkeypatch.setattr(backends, "_no_triton", lambda: None)
    monkeypatch.setattr(backends, "_no_triton_kernel", lambda op, x: None)
    case = next(c for c in vision("deit_s", 197) if c.op == "low_rank_linear")
    x, v, u, bias, activation, residual = draw(case, torch.float16)
    leaves = [t.requires_grad_() for t in (x, v, u, bias, residual)]
    grad = incoming(case, [x])
    with backends.use_backend("triton"), emulated("sm_80") as launches:
        out = ops.low_rank_linear(x, v, u, bias, activation, residual)
    with emulated("sm_80") as backward_launches:
        found = torch.autograd.grad(out, leaves, grad)
    assert [launch.name for launch in launches] == ["low_rank_linear_kernel"]
    assert "low_rank_linear_backward_kernel" in [launch.name for launch in backward_launches]
    exact, plain = oracles(case, "fp16", [t.detach() if isinstance(t, torch.Tensor) else t
                                          for t in (x, v, u, bias, activation, residual)], grad)
    actual = {"out": out} | dict(zip(("dx", "dv", "du", "dbias"), found, strict=False))
    assert worst(actual, exact, plain) == []
    assert torch.equal(found[4], grad)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_split_k_of_a_single_element(architecture: str) -> None:
    """Triton compiles an argument of 1 as a constant."""
    partial = torch.tensor([[1.0], [2.0], [4.0]])
    with emulated(architecture):
        assert sum_splits(partial, torch.float16).item() == 7.0


def test_gradients_are_the_same_every_time() -> None:
    """Split-k adds the splits in a fixed order, so gradients repeat bit for bit."""
    case = Case("low_rank_mlp", "repeated",
                dict(lead=(700,), d=32, r1=16, hidden=64, r2=16, out=32), {"ACTIVATION": "gelu"})
    arguments = draw(case, torch.float16)
    grad = incoming(case, arguments)
    with emulated("sm_80") as launches:
        first, second = (run_kernels(case, arguments, grad) for _ in range(2))
    assert any(launch.name == "sum_splits_kernel" for launch in launches)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "quick_gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_activations_keep_nan(dtype: torch.dtype, activation: str) -> None:
    x, v, u = (torch.randn(*shape).to(dtype) for shape in ((4, 16), (16, 16), (16, 16)))
    x[2, 3] = torch.nan
    with emulated("sm_80"):
        out, _ = load("low_rank_linear").forward(x, v, u, None, activation)
    assert out.isnan().all(1).tolist() == [False, False, True, False]
    assert not out[[0, 1, 3]].isnan().any()
