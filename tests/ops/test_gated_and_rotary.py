"""rotary_attention and gated_mlp: two sublayers that only `optimize` uses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cpu_cases import each_dtype
from helpers.op_cases import strided
from helpers.tolerance import assert_close_to_float64
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adacomcat import ops
from adacomcat.ops import backends, inference, packing
from adacomcat.ops.registry import OPS

EPSILON = 1e-5
# images, tokens, tokens that turn, width, heads, head size, rank of values, ranks of q and k
ROTARY = [(1, 197, 196, 96, 6, 16, 16, None, None), (3, 50, 45, 37, 2, 6, 9, 5, None),
          (2, 9, 9, 48, 3, 64, 40, None, 17), (5, 23, 0, 64, 5, 2, 3, 24, 8),
          (1, 261, 256, 64, 2, 32, 24, 16, 16), (2, 40, 36, 48, 1, 88, 20, None, None),
          (0, 7, 4, 16, 2, 4, 4, None, None)]
# rows, width, hidden, out, first rank, second rank
GATED = [((2, 197), 64, 300, 64, None, None), ((61,), 48, 129, 33, 16, 40),
         ((2, 30), 33, 64, 70, None, 9), ((700,), 40, 96, 24, 7, None), ((1,), 16, 24, 8, 3, 5),
         ((0,), 16, 24, 8, None, None)]


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) / max(columns, 1) ** 0.5


def draw_rotary(sizes: tuple, dtype: torch.dtype, angles: str = "shared") -> dict[str, Any]:
    images, tokens, turned, d, heads, head_dim, vo, rank_q, rank_k = sizes
    lead = {"shared": (), "heads": (heads,), "all": (images, 1)}[angles]
    angle = torch.randn(*lead, turned, head_dim // 2) * 3
    drawn: dict[str, Any] = {"x": torch.randn(images, tokens, d)}
    for letter, rank in (("q", rank_q), ("k", rank_k)):
        drawn[f"v{letter}"] = None if rank is None else matrix(d, rank)
        drawn[f"w{letter}"] = matrix(heads * head_dim, d if rank is None else rank)
        drawn[f"b{letter}"] = torch.randn(heads * head_dim)
    drawn |= {"wv": matrix(heads * vo, d), "wo": matrix(d, heads * vo), "bo": torch.randn(d)}
    drawn = {name: t if t is None else t.to(dtype) for name, t in drawn.items()}
    return drawn | {"num_heads": heads, "scale": 0.37, "angle": angle}


def arguments_of(drawn: dict[str, Any], half: bool, dtype: torch.dtype | None = None
                 ) -> dict[str, Any]:
    """Those of the op: each pair of elements has one angle."""
    given = dict(drawn)
    angle = given.pop("angle")
    both = torch.cat([angle, angle], -1) if half else angle.repeat_interleave(2, -1)
    dtype = dtype or drawn["x"].dtype
    return given | {"sin": both.sin().to(dtype), "cos": both.cos().to(dtype), "half": half}


def turned(x: Tensor, angle: Tensor, half: bool) -> Tensor:
    """A pair of elements is a complex number; a rotation multiplies it by e^(i angle)."""
    prefix = x.shape[-2] - angle.shape[-2]
    last = x[..., prefix:, :].double()
    a, b = last.chunk(2, -1) if half else (last[..., ::2], last[..., 1::2])
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle).double(), angle.double())
    parts = torch.cat([z.real, z.imag], -1) if half else torch.view_as_real(z).flatten(-2)
    return torch.cat([x[..., :prefix, :].double(), parts], -2)


def by_complex_numbers(drawn: dict[str, Any], half: bool, mask: Tensor | None = None) -> Tensor:
    g = {name: t.double() if isinstance(t, Tensor) else t for name, t in drawn.items()}
    x, heads = g["x"], g["num_heads"]
    normed = F.layer_norm(x, x.shape[-1:], eps=EPSILON)

    def of_heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k = (turned(of_heads(F.linear(normed if g[f"v{i}"] is None else normed @ g[f"v{i}"],
                                     g[f"w{i}"], g[f"b{i}"])), g["angle"], half) for i in "qk")
    logits = g["scale"] * q @ k.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    y = logits.softmax(-1) @ of_heads(normed @ g["wv"].T)
    return x + y.transpose(1, 2).flatten(2) @ g["wo"].T + g["bo"]


def fused(drawn: dict[str, Any], half: bool, **others: Any) -> Tensor:
    return inference.rotary_attention(**arguments_of(drawn, half), **others, epsilon=EPSILON,
                                      residual=drawn["x"])


@each_dtype
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("sizes", ROTARY, ids=str)
def test_rotary_attention(sizes: tuple, half: bool, dtype: torch.dtype, instruction_set: str,
                          poisoned_memory: None) -> None:
    drawn = draw_rotary(sizes, dtype)
    exact = by_complex_numbers(drawn, half)
    with backends.use_backend("reference"):
        plain = fused(drawn, half)
    actual = fused(drawn, half)
    assert_close_to_float64(actual, exact, plain)
    again = {name: strided(t) if isinstance(t, Tensor) else t
             for name, t in arguments_of(drawn, half).items()}
    repeated = inference.rotary_attention(**again, epsilon=EPSILON, residual=drawn["x"])
    torch.testing.assert_close(repeated, actual)


@pytest.mark.parametrize("angles", ["heads", "all"])
def test_heads_and_images_may_have_angles_of_their_own(angles: str) -> None:
    drawn = draw_rotary((3, 50, 45, 37, 2, 6, 9, 5, None), torch.float32, angles)
    seen = torch.ones(50, 50, dtype=torch.bool).tril()
    exact = by_complex_numbers(drawn, False, seen)
    assert_close_to_float64(fused(drawn, False, attn_mask=seen), exact, exact.float())


def test_angles_in_float32_turn_bfloat16() -> None:
    drawn = draw_rotary(ROTARY[4], torch.bfloat16)
    exact = by_complex_numbers(drawn, True)
    given = arguments_of(drawn, True, torch.float32)
    options = {"epsilon": EPSILON, "residual": drawn["x"]}
    with backends.use_backend("reference"):
        plain = inference.rotary_attention(**given, **options)
    assert_close_to_float64(inference.rotary_attention(**given, **options), exact, plain)
    given["sin"], given["cos"] = given["sin"].double(), given["cos"].double()
    assert_close_to_float64(inference.rotary_attention(**given, **options), exact, plain)


def test_without_angles_nothing_turns() -> None:
    drawn = draw_rotary(ROTARY[0], torch.float32)
    given = arguments_of(drawn, True) | {"sin": None, "cos": None, "bk": None}
    weights = [given[name] for name in ("x", "wq", "bq", "wk", "wv", "wo", "bo")]
    expected = ops.low_rank_attention(*weights, given["num_heads"], given["scale"])
    torch.testing.assert_close(inference.rotary_attention(**given), expected)


def draw_gated(sizes: tuple, dtype: torch.dtype, bias: bool = True) -> dict[str, Any]:
    lead, d, hidden, out, rank1, rank2 = sizes
    drawn = {"x": torch.randn(*lead, d), "v1": None if rank1 is None else matrix(d, rank1),
             "wg": matrix(hidden, rank1 or d), "bg": torch.randn(hidden),
             "w1": matrix(hidden, rank1 or d), "b1": torch.randn(hidden),
             "v2": None if rank2 is None else matrix(hidden, rank2),
             "w2": matrix(out, rank2 or hidden), "b2": torch.randn(out)}
    return {name: None if t is None or (name.startswith("b") and not bias) else t.to(dtype)
            for name, t in drawn.items()}


def plain_gated(g: dict[str, Any], activation: str | None, residual: Tensor) -> Tensor:
    acts = {"silu": F.silu, "gelu": F.gelu, None: lambda x: x}
    x = F.layer_norm(g["x"], g["x"].shape[-1:], eps=EPSILON)
    w_gate, w1, w2 = g["wg"], g["w1"], g["w2"]
    if g["v1"] is not None:
        w_gate, w1 = w_gate @ g["v1"].mT, w1 @ g["v1"].mT
    if g["v2"] is not None:
        w2 = w2 @ g["v2"].mT
    hidden = acts[activation](F.linear(x, w_gate, g["bg"])) * F.linear(x, w1, g["b1"])
    return residual + F.linear(hidden, w2, g["b2"])


@each_dtype
@pytest.mark.parametrize("activation, bias", [("silu", True), ("gelu", False), (None, True)])
@pytest.mark.parametrize("sizes", GATED, ids=str)
def test_gated_mlp(sizes: tuple, activation: str | None, bias: bool, dtype: torch.dtype,
                   instruction_set: str, poisoned_memory: None) -> None:
    drawn = draw_gated(sizes, dtype, bias)
    residual = torch.randn(*sizes[0], sizes[3]).to(dtype)
    doubled = {name: None if t is None else t.double() for name, t in drawn.items()}
    exact = plain_gated(doubled, activation, residual.double())
    options: dict[str, Any] = {"activation": activation, "epsilon": EPSILON}
    with backends.use_backend("reference"):
        plain = inference.gated_mlp(**drawn, **options, residual=residual)
    actual = inference.gated_mlp(**drawn, **options, residual=residual)
    assert_close_to_float64(actual, exact, plain)
    again = {name: None if t is None else strided(t) for name, t in drawn.items()}
    torch.testing.assert_close(inference.gated_mlp(**again, **options, residual=residual), actual)


def test_gradients_come_from_the_formulas() -> None:
    drawn = draw_rotary((1, 5, 3, 6, 2, 4, 2, 3, None), torch.float64)
    given = arguments_of(drawn, False)
    names = [name for name, t in given.items() if isinstance(t, Tensor)]
    assert torch.autograd.gradcheck(
        lambda *t: inference.rotary_attention(**{**given, **dict(zip(names, t, strict=True))},
                                              epsilon=EPSILON, residual=t[0]),
        [given[name].requires_grad_() for name in names])
    gated = {name: t if t is None else t.requires_grad_()
             for name, t in draw_gated(((3,), 5, 4, 3, 2, None), torch.float32).items()}
    inference.gated_mlp(**gated, activation="silu").sum().backward()
    assert all(t is None or t.grad is not None for t in gated.values())


@pytest.mark.skipif(backends.available()["cpp"] is not None, reason="no extension")
class TestKernels:
    def calls(self) -> dict[str, tuple]:
        rotary = arguments_of(draw_rotary((2, 9, 7, 24, 3, 8, 4, 5, None), torch.float32), True)
        gated = draw_gated(((2, 30), 24, 40, 24, 8, 6), torch.float32)
        found = {"rotary_attention": rotary | {"attn_mask": None},
                 "gated_mlp": gated | {"activation": "silu"}}
        return {op: tuple(given[a.split(" ")[1]] for a in OPS[op].arguments.split(", "))
                for op, given in found.items()}

    @pytest.mark.parametrize("op", ["rotary_attention", "gated_mlp"])
    def test_opcheck(self, op: str) -> None:
        torch.library.opcheck(getattr(torch.ops.adacomcat, f"{op}_cpu").default, self.calls()[op])

    @pytest.mark.parametrize("op, products", [
        # vq and wq, wk, wv and wo of 9 tokens in 2 images; q kᵀ and p v of 3 heads
        ("rotary_attention", 18 * (24 * 5 + 5 * 24 + 24 * 24 + 2 * 24 * 12) + 2 * 81 * 3 * (8 + 4)),
        ("gated_mlp", 60 * (24 * 8 + 2 * 8 * 40 + 40 * 6 + 6 * 24))])
    def test_flops(self, op: str, products: int) -> None:
        with FlopCounterMode(display=False) as counter:
            getattr(inference, op)(*self.calls()[op])
        assert counter.get_total_flops() == 2 * products

    @each_dtype
    @pytest.mark.parametrize("op, weights", [
        ("rotary_attention", {"vq": False, "wq": True, "wk": True, "wv": True, "wo": True}),
        ("gated_mlp", {"v1": False, "wg": True, "w1": True, "v2": False, "w2": True})])
    def test_packed_weights_give_the_same_bits(self, op: str, weights: dict, dtype: torch.dtype
                                               ) -> None:
        given = [t.to(dtype) if isinstance(t, Tensor) else t for t in self.calls()[op]]
        names = [a.split(" ")[1] for a in OPS[op].arguments.split(", ")]
        kernel = backends.direct_kernel(op, given[0])
        packed = list(given)
        for name, transposed in weights.items():
            place = names.index(name)
            packed[place] = packing.pack(given[place], transposed)[0]
        assert torch.equal(kernel(*packed), kernel(*given))

    @pytest.mark.parametrize("name, change, message", [
        ("vq", lambda t: t[:-1], "vq must have shape"),
        ("wk", lambda t: t[:, :-1], "wk must have shape"),
        ("bk", lambda t: t[:-1], "bk must have shape"),
        ("sin", lambda t: None, "sin and cos must come together"),
        ("sin", lambda t: t[:-1], "cos must have sin's shape"),
        ("cos", lambda t: t.bfloat16(), "cos is torch.bfloat16 and sin is"),
        ("attn_mask", lambda t: torch.zeros(1, 1, 1, 9, 9), "attn_mask must broadcast"),
    ])
    def test_wrong_arguments_of_rotary_attention(self, name: str, change: Any, message: str
                                                 ) -> None:
        given = list(self.calls()["rotary_attention"])
        names = [a.split(" ")[1] for a in OPS["rotary_attention"].arguments.split(", ")]
        given[names.index(name)] = change(given[names.index(name)])
        with pytest.raises(RuntimeError, match=message):
            inference.rotary_attention(*given)

    @pytest.mark.parametrize("name, message", [
        ("v1", "v1 must have shape"), ("wg", "wg must have shape"), ("w1", "w1 must have shape"),
        ("b1", "b1 must have shape"), ("v2", "v2 must have shape"), ("w2", "w2 must have shape")])
    def test_wrong_arguments_of_gated_mlp(self, name: str, message: str) -> None:
        given = list(self.calls()["gated_mlp"])
        names = [a.split(" ")[1] for a in OPS["gated_mlp"].arguments.split(", ")]
        place = names.index(name)
        given[place] = given[place][..., :-1] if name[0] in "wb" else given[place][:-1]
        with pytest.raises(RuntimeError, match=message):
            inference.gated_mlp(*given)
