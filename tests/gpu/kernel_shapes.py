"""The shapes of all cases: ragged ones that no tile divides, and those of DeiT-S and DeiT-B."""

from collections.abc import Iterator
from dataclasses import replace

from kernel_cases import Case

from adacomcat.kernels import SUBLAYERS

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", None, "quick_gelu")
# lead, in, rank, out
LINEAR = {
    "tokens": ((2, 97), 48, 12, 96),
    "rank-1": ((3, 5), 31, 1, 17),
    "odd": ((129,), 65, 33, 71),
    "vector": ((), 8, 3, 4),
    "one-row": ((1,), 7, 5, 130),
    "empty": ((0, 4), 8, 3, 4),
    "rank-0": ((4,), 8, 0, 5),
    "width-0": ((4,), 0, 2, 5),
    "wide-rank": ((20,), 70, 300, 40),
    "rank-512": ((18,), 80, 512, 24),
    "aligned": ((64,), 128, 64, 128),
    "197": ((197,), 40, 24, 56),
    "many-rows": ((700,), 20, 5, 33),  # split-k
    # The factors are so large that x V, or grad U, is a launch of its own.
    "tall": ((37,), 50, 65, 1030),
    "long": ((37,), 1030, 65, 50),
    "long-row": ((1,), 2050, 33, 9),
    "long-and-tall": ((21,), 1030, 65, 1030),
}
# lead, in, rank 1, hidden, rank 2, out
MLP = {
    "tokens": ((2, 33), 48, 12, 100, 20, 48),
    "rank-1": ((3, 5), 31, 1, 17, 1, 9),
    "odd": ((65,), 33, 17, 71, 35, 29),
    "vector": ((), 8, 3, 40, 4, 8),
    "one-row": ((1,), 7, 5, 130, 3, 7),
    "empty": ((0, 4), 8, 3, 16, 4, 8),
    "rank-0": ((4,), 8, 0, 9, 2, 5),
    "wide-ranks": ((18,), 40, 200, 50, 100, 40),
    "rank-512": ((10,), 24, 512, 40, 16, 24),
    "aligned": ((64,), 64, 32, 128, 64, 64),
    "197": ((197,), 40, 24, 96, 16, 40),
    "many-rows": ((1100,), 20, 5, 33, 7, 18),
    "long": ((40,), 1030, 65, 70, 30, 50),
    "tall": ((40,), 50, 30, 70, 65, 1030),
}
# batch, tokens, width, heads, rank of queries and keys, rank of values, mask
ATTENTION = {
    "tokens": (2, 50, 24, 2, 8, 20, None),
    "197": (1, 197, 24, 1, 16, 8, None),
    "odd": (2, 33, 17, 2, 11, 7, "rows"),
    "one-token": (3, 1, 12, 2, 8, 8, None),
    "keys": (2, 40, 24, 2, 16, 24, "keys"),
    "additive": (1, 37, 24, 3, 8, 16, "additive"),
    "rows": (1, 70, 16, 1, 24, 40, "rows"),
    "wide-queries": (1, 20, 24, 1, 128, 8, None),
    "wide-values": (1, 20, 24, 1, 8, 128, "additive"),
    "empty": (0, 5, 12, 2, 8, 8, None),
    "aligned": (1, 64, 32, 2, 32, 32, None),
    "lowest": (1, 45, 16, 2, 8, 16, "lowest"),
}
# lead, in, rank 1, hidden, rank 2, out; None where a side is dense
GATED = {
    "tokens": ((2, 33), 48, 12, 100, 20, 48),
    "rank-1": ((3, 5), 31, 1, 17, 1, 9),
    "odd": ((65,), 33, 17, 71, 35, 29),
    "vector": ((), 8, 3, 40, 4, 8),
    "one-row": ((1,), 7, 5, 130, 3, 7),
    "empty": ((0, 4), 8, 3, 16, 4, 8),
    "rank-0": ((4,), 8, 0, 9, 2, 5),
    "aligned": ((64,), 64, 32, 128, 64, 64),
    "long": ((40,), 1030, 65, 70, 30, 50),
    "dense": ((2, 33), 48, None, 100, None, 48),
    "dense-up": ((70,), 33, None, 65, 9, 24),
    "dense-down": ((1,), 40, 12, 70, None, 29),
    "dense-vector": ((), 8, None, 40, None, 8),
    "dense-empty": ((0,), 8, None, 40, None, 8),
    "dense-wide": ((18,), 40, 200, 50, 100, 40),
}
# batch, tokens, width, heads, head size, rank of values, of queries, of keys, tokens that turn,
# leading sizes of the angles, mask
ROTARY = {
    "images": (2, 20, 24, 2, 8, 20, None, None, 19, (), None),
    "odd": (2, 33, 17, 2, 6, 7, 5, None, 30, (2,), "rows"),
    "one-token": (3, 1, 12, 2, 8, 8, None, None, 1, (), None),
    "keys": (2, 24, 24, 2, 22, 24, None, 11, 24, (2, 1), "keys"),
    "rank-1": (1, 20, 16, 2, 4, 1, 1, 1, 15, (1,), None),
    "additive": (1, 21, 24, 3, 2, 16, 7, 9, 21, (1, 3), "additive"),
    "wide-heads": (1, 20, 24, 1, 200, 8, None, None, 18, (), None),
    "still": (2, 9, 12, 2, 5, 4, 3, None, 9, (), None),
    "no-turn": (2, 9, 12, 2, 6, 4, None, 3, 0, (), None),
    "empty": (0, 5, 12, 2, 8, 8, None, None, 4, (), None),
    "aligned": (1, 32, 32, 2, 32, 32, None, None, 32, (), None),
}
SUBLAYER_NAMES = ("dense", "dense-up", "dense-down", "dense-vector", "dense-wide", "tokens", "odd",
                  "vector", "empty", "197", "wide-ranks", "many-rows", "long", "one-token", "rows",
                  "keys", "additive", "rank-512", "aligned")
DEIT = {"deit_s": (384, 128, 6), "deit_b": (768, 256, 12)}


def ragged() -> list[Case]:
    """Every op on ragged shapes; absent and transposed tensors take turns."""
    found = []
    for i, (name, (lead, d, r, out)) in enumerate(LINEAR.items()):
        sizes = {"lead": lead, "d": d, "r": r, "out": out}
        absent = ((), ("bias",), ("residual",), ("bias", "residual"))[i % 4]
        strided = ((), ("v",), ("u", "x"), ("residual",))[i % 4] if len(lead) == 1 else ()
        options = {"ACTIVATION": ACTIVATIONS[i % 6]}
        found.append(Case("low_rank_linear", name, sizes, options, absent, strided))
        found.append(Case("gated_low_rank_linear", name, sizes, {}, absent, strided))
    for i, (name, (lead, d, r1, hidden, r2, out)) in enumerate(MLP.items()):
        sizes = dict(lead=lead, d=d, r1=r1, hidden=hidden, r2=r2, out=out)
        absent = ((), ("b1",), ("b2",), ("b1", "b2"))[i % 4]
        strided = ((), ("v1", "u2"), ("u1", "v2"), ())[i % 4]
        options = {"ACTIVATION": ACTIVATIONS[i % 6]}
        found.append(Case("low_rank_mlp", name, sizes, options, absent, strided))
    for i, (name, (batch, tokens, d, heads, qk, vo, mask)) in enumerate(ATTENTION.items()):
        sizes = dict(batch=batch, tokens=tokens, d=d, rank_qk=qk, rank_vo=vo, mask=mask)
        absent = ((), ("bq",), ("bo",), ("bq", "bo"))[i % 4]
        strided = ((), ("wq",), ("wo", "wv"), ("wk",))[i % 4]
        options = {"NUM_HEADS": heads, "SCALE": qk**-0.5}
        found.append(Case("low_rank_attention", name, sizes, options, absent, strided))
    found += [*ragged_gated(), *ragged_rotary()]
    return found + [replace(case, sublayer=True) for case in found
                    if case.op in SUBLAYERS and case.name in SUBLAYER_NAMES]


def ragged_gated() -> Iterator[Case]:
    for i, (name, (lead, d, r1, hidden, r2, out)) in enumerate(GATED.items()):
        sizes = dict(lead=lead, d=d, r1=r1, hidden=hidden, r2=r2, out=out)
        dense = [factor for factor, rank in (("v1", r1), ("v2", r2)) if rank is None]
        absent = ((), ("bg",), ("b1", "b2"), ("bg", "b1", "b2"))[i % 4]
        strided = ((), ("v1", "w2"), ("wg", "v2"), ("w1",))[i % 4]
        options = {"ACTIVATION": ACTIVATIONS[i % 6]}
        yield Case("gated_mlp", name, sizes, options, (*absent, *dense), strided)


def ragged_rotary() -> Iterator[Case]:
    for i, (name, (batch, tokens, d, heads, head_dim, vo, rank_q, rank_k, turned, angles, mask)
            ) in enumerate(ROTARY.items()):
        sizes = dict(batch=batch, tokens=tokens, d=d, head_dim=head_dim, rank_vo=vo, rank_q=rank_q,
                     rank_k=rank_k, turned=turned, angles=angles, mask=mask)
        dense = [factor for factor, rank in (("vq", rank_q), ("vk", rank_k)) if rank is None]
        absent = ((), ("bq",), ("bk", "bo"), ("bq", "bk"))[i % 4]
        strided = ((), ("wq", "wv"), ("wk", "sin"), ("vq", "vk"))[i % 4]
        unturned = ("sin", "cos") if name == "still" else ()
        options = {"NUM_HEADS": heads, "SCALE": head_dim**-0.5, "HALF": i % 2 == 0}
        yield Case("rotary_attention", name, sizes, options, (*absent, *dense, *unturned), strided)


def vision(model: str, tokens: int) -> list[Case]:
    """Every op of a DeiT: MLP ranks of 128 or 256, head ranks of 32 (qk) and 48 (vo).

    Gated MLPs and rotary attentions are those of EVA-02 in its width, low-rank as sublayers, with
    MLP ranks of 128, and else dense.
    """
    d, r, heads = DEIT[model]
    name = f"{model}-{tokens}"
    linear = {"lead": (tokens,), "d": d, "r": r, "out": d}
    mlp = {"lead": (tokens,), "d": d, "r1": r, "hidden": 4 * d, "r2": r, "out": d}
    attention = dict(batch=tokens // 197, tokens=197, d=d, rank_qk=32, rank_vo=48)
    options = {"NUM_HEADS": heads, "SCALE": 64**-0.5}
    gated = {"lead": (tokens,), "d": d, "r1": None, "hidden": 8 * d // 3, "r2": None, "out": d}
    rotary = dict(batch=tokens // 197, tokens=197, d=d, head_dim=64, rank_vo=48, rank_q=None,
                  rank_k=None, turned=196, angles=())
    return [
        Case("low_rank_linear", name, linear, {"ACTIVATION": "gelu"}),
        Case("gated_low_rank_linear", name, linear),
        Case("low_rank_mlp", name, mlp, {"ACTIVATION": "gelu"}),
        Case("low_rank_attention", name, attention, options),
        Case("low_rank_mlp", name, mlp, {"ACTIVATION": "gelu"}, sublayer=True),
        Case("low_rank_attention", name, attention, options, sublayer=True),
        Case("gated_mlp", name, gated, {"ACTIVATION": "silu"}, ("v1", "v2")),
        Case("gated_mlp", name, gated | {"r1": 128, "r2": 128}, {"ACTIVATION": "silu"},
             sublayer=True),
        Case("rotary_attention", name, rotary, options | {"HALF": True}, ("vq", "vk")),
        Case("rotary_attention", name, rotary | {"rank_q": 64, "rank_k": 64},
             options | {"HALF": False}, sublayer=True),
    ]


def ragged_and_vision() -> list[Case]:
    """All ragged cases, and both DeiTs at one and two images."""
    return [*ragged(), *(case for model in DEIT for tokens in (197, 394)
                         for case in vision(model, tokens))]
