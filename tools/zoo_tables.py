"""The tables of docs/families.md on timm's families, from the census of ``tools/zoo.py``.

    python tools/generate_docs.py families
"""

from collections.abc import Iterable, Mapping, Sequence

import zoo

LEAST_SHARE = 0.5  # of the parameters, in sites: families without attention below it are not listed
LEAST_DENSE = 0.02  # of the parameters: smaller parts that stay dense are not named
HEADER = ("timm module", "architectures", "A", "B", "C", "in sites", "`optimize` fuses",
          "stays dense")
UNKNOWN_HEADER = ("why it does not fold", "attention")
# What an attention computes beside softmax(q kᵀ + bias) v of its tokens, which alone would fold.
WHY: Mapping[str, tuple[str, ...]] = {
    "softmax(q kᵀ + bias) v, in a class that no family reads yet": (
        "convit.MHSA", "davit.WindowAttention", "fastvit.Attention", "maxxvit.AttentionCl",
        "metaformer.Attention", "nest.Attention", "tnt.Attention", "twins.LocallyGroupedAttn",
        "vision_transformer_relpos.RelPosAttention", "volo.Attention"),
    "its projections are convolutions": (
        "attention2d.MultiQueryAttention2d", "bottleneck_attn.BottleneckAttn",
        "cpubone.ConvAttention", "halo_attn.HaloAttn", "iformer.SHMA",
        "lowformer.ConvAttention", "maxxvit.Attention2d", "shvit.SHSA", "visformer.Attention"),
    "one token alone queries": (
        "attention_pool.AttentionPoolLatent", "attention_pool2d.AttentionPool2d",
        "cait.ClassAttn", "crossvit.CrossAttention", "volo.ClassAttention"),
    "queries, keys or values are those of pooled tokens": (
        "hiera.MaskUnitAttention", "hieradet_sam2.MultiScaleAttention",
        "mvitv2.MultiScaleAttention", "nextvit.EfficientAttention", "pvt_v2.Attention",
        "twins.GlobalSubSampleAttn"),
    "it attends across channels": (
        "davit.ChannelAttention", "davit.ChannelAttentionV2", "edgenext.CrossCovarianceAttn",
        "xcit.XCA"),
    "no softmax of q kᵀ weighs the values": (
        "coat.FactorAttnConvRelPosEnc", "efficientvit_mit.LiteMLA", "lambda_layer.LambdaLayer",
        "mobilevit.LinearSelfAttention", "swiftformer.EfficientAdditiveAttention"),
    "heads are mixed around the softmax": (
        "cait.TalkingHeadAttn", "efficientformer_v2.Attention2d",
        "efficientformer_v2.Attention2dDownsample"),
    "a norm stands behind the values": (
        "attention.Attention as built", "eva.EvaAttention as built",
        "gemma4_vit.Gemma4Attention"),
    "values are wider than keys": (
        "efficientformer.Attention", "levit.Attention", "levit.AttentionDownsample"),
    "heads share keys and values": ("attention.AttentionRope as built",),
    "a gate adds attention by position behind the softmax": ("convit.GPSA",),
    "queries, keys and values are single numbers": ("csatv2.SpatialTransformerBlock",),
    "the difference of two softmaxes weighs the values": ("diff_attention.DiffAttention",),
    "each head reads what the head before it made": (
        "efficientvit_msra.CascadedGroupAttention",),
    "in every second block all windows share queries": ("gcvit.WindowAttentionGlobal",),
    "cosine attention, in a class that no family reads yet": (
        "swin_transformer_v2_cr.WindowMultiHeadAttention",),
    "a norm of its own stands before the projections": ("tiny_vit.Attention",),
    "one layer projects for the attention and the MLP": (
        "vision_transformer.DiffParallelScalingBlock", "vision_transformer.ParallelScalingBlock"),
    "queries decide the position bias": ("vision_transformer_sam.Attention",),
}


def tables(entries: Sequence[zoo.Entry]) -> str:
    """Families whose attention folds, the others, and why theirs does not."""
    from generate_docs import markdown_table

    every = by_family(entries)
    shown = {family: found for family, found in every.items() if listed(found)}
    folding = [family for family, found in shown.items()
               if any(one.sites.get(tier) for one in found for tier in "AB")]
    others = [family for family in shown if family not in folding]
    left_out = [one for family, found in every.items() if family not in shown for one in found]
    shares = [one.share for one in left_out]
    return "\n\n".join((
        "### Attention folds", markdown_table(HEADER, [row(f, shown[f]) for f in folding]),
        "### Linear layers only", markdown_table(HEADER, [row(f, shown[f]) for f in others]),
        f"The other {len(left_out)} architectures, of {len(every) - len(shown)} modules, have no "
        f"attention, and {_range(shares)} of their parameters are in sites: most are in "
        "convolutions.",
        "### Attentions that do not fold",
        markdown_table(UNKNOWN_HEADER, unknown_rows(entries))))


def listed(entries: Sequence[zoo.Entry]) -> bool:
    """Whether a family has a row: it attends, or half of one of its members is in sites."""
    return any(one.attends or one.share >= LEAST_SHARE for one in entries)


def by_family(entries: Iterable[zoo.Entry]) -> dict[str, list[zoo.Entry]]:
    found: dict[str, list[zoo.Entry]] = {}
    for one in entries:
        found.setdefault(one.family, []).append(one)
    return found


def row(family: str, entries: Sequence[zoo.Entry]) -> tuple[str, ...]:
    """One family: what holds for all of its architectures, from the least to the most."""
    tiers = (_range([one.sites.get(tier, 0) / one.params for one in entries]) for tier in "ABC")
    return (f"`{family}`", str(len(entries)), *tiers, _range([one.share for one in entries]),
            _fused(entries), _dense(entries))


def _range(shares: Sequence[float]) -> str:
    low, high = (f"{share:.2f}" for share in (min(shares), max(shares)))
    if high == "0.00":
        return "–"
    return low if low == high else f"{low}–{high}"


def _fused(entries: Sequence[zoo.Entry]) -> str:
    counts = {part: sum(part in one.fused for one in entries) for part in zoo.FUSED}
    every = len(entries)
    if set(counts.values()) == {every}:
        return "attention and MLP"
    found = [part if count == every else f"{part} of {count}"
             for part, count in counts.items() if count]
    return ", ".join(found) or "–"


def _dense(entries: Sequence[zoo.Entry]) -> str:
    kinds = dict.fromkeys(kind for one in entries for kind in one.dense)
    shares = {kind: [one.dense.get(kind, 0) / one.params for one in entries] for kind in kinds}
    order = sorted(shares, key=lambda kind: -max(shares[kind]))
    return ", ".join(f"{kind} {_range(shares[kind])}" for kind in order
                     if max(shares[kind]) >= LEAST_DENSE) or "–"


def unknown_rows(entries: Iterable[zoo.Entry]) -> list[tuple[str, ...]]:
    """Every reason for which an attention does not fold, and the classes that it holds for.

    Raises:
        SystemExit: Nobody has told the reason of a class.
    """
    found = {kind for one in entries for kind in one.unknown}
    if missing := sorted(found - {name for names in WHY.values() for name in names}):
        raise SystemExit(f"zoo_tables.WHY lacks {', '.join(missing)}")
    return [(why, ", ".join(f"`{name}`" for name in sorted(found & set(names))))
            for why, names in WHY.items() if found & set(names)]
