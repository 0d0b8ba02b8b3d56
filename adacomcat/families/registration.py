"""Makes classes of attention known to sites, calibration, conversion and search."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from adacomcat.errors import UserError
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.registry import (
    AttentionFamily,
    AttentionParts,
    Tier,
    TierOf,
    add_attention,
    load_family,
)


def register_attention(kind: type[nn.Module], read: Callable[[Any], AttentionParts],
                       low_rank: Mapping[Tier, type[LowRankAttention]],
                       tier: TierOf | None = None) -> None:
    """Let ``find_sites``, ``compress`` and the rest treat attentions of exactly this class.

    Register a class before you use it, in every process that does. The last registration wins.

    Args:
        kind: Your class of attention. Subclasses are not meant: they may compute something else.
        read: Reads an instance: where its projections are, how many heads, the scale.
        low_rank: Tier → the drop-in. Tier 'A' folds queries with keys and values with outputs; it
            is for plain softmax attention, whose logits may get a mask or a bias added. Tier 'B'
            folds values with outputs only; it is for what changes q or k behind their projections
            (rotary embeddings, norms, cosine attention), and its drop-in derives from
            ``ValueFoldedAttention``. A drop-in whose forward takes other arguments than
            (x, attn_mask, is_causal) says in ``score_context`` what they mean.
        tier: (attention, whole model or None) → 'A', 'B', or None for an instance that does not
            fold (its linear layers are then treated one by one). Without it, the only tier of
            ``low_rank``.

    Raises:
        UserError: ``low_rank`` names another tier, several without ``tier``, or a class that is no
            ``LowRankAttention``.

    Example:
        >>> class LowRankMine(adacomcat.LowRankAttention):
        ...     def score_context(self, tokens, padding=None):  # arguments of Mine.forward
        ...         return (None if padding is None else ~padding[:, None, None]), None
        >>> def read(attn):
        ...     parts = (attn.query, attn.key, attn.value, attn.output)
        ...     return families.AttentionParts(*map(families.Projection.of, parts),
        ...                                    num_heads=attn.heads, scale=attn.scale)
        >>> adacomcat.register_attention(Mine, read, {"A": LowRankMine})
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"an attention is registered by its class; {kind!r} is no nn.Module class")
    for name, drop_in in low_rank.items():
        if name not in ("A", "B"):
            raise UserError(f"{kind.__name__}: low_rank names the tier {name!r}; there are 'A' and "
                            "'B'")
        if not (isinstance(drop_in, type) and issubclass(drop_in, LowRankAttention)):
            raise UserError(f"{kind.__name__}: the drop-in {drop_in!r} must be a subclass of "
                            "adacomcat.LowRankAttention")
    if tier is None:
        if len(low_rank) != 1:
            raise UserError(f"{kind.__name__}: low_rank names {len(low_rank)} tiers; pass tier= to "
                            "say which one an instance has")
        tier = _always(*low_rank)
    load_family(kind)
    add_attention(kind, AttentionFamily(read, {**low_rank}, tier))


def _always(tier: Tier) -> TierOf:
    return lambda attn, model: tier
