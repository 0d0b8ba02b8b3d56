"""Which ranks per head the fused attention of a runtime takes.

PyTorch's flash attention wants queries, keys and values of one width, a multiple of 8; TensorRT's
fused attention has kernels for 16, 32 and 64. With other ranks these runtimes compute the same, in
several steps. Our own kernels take any ranks.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby

from adacomcat.sites import DENSE, Rank, Site

# Runtime → whether its fused attention takes heads of this width.
WIDTHS: Mapping[str, Callable[[int], bool]] = {
    "flash": lambda width: width % 8 == 0,
    "tensorrt": lambda width: width in (16, 32, 64),
}


def fuses(runtime: str, rank_qk: int, rank_vo: int) -> bool:
    """Whether the runtime's fused attention takes these ranks per head."""
    return rank_qk == rank_vo and WIDTHS[runtime](rank_qk)


def allows(deploy: str, sites: Iterable[Site], ranks: Iterable[Rank]) -> bool:
    """Whether every attention among ``sites`` is dense at these ranks, or fuses there.

    Args:
        deploy: A key of ``WIDTHS``; 'any' allows all.
        sites: Decisions that are taken together: all that an attention has, among others.
        ranks: One for each site.
    """
    widths: dict[str, dict[str, int]] = {}
    for site, rank in zip(sites, ranks, strict=True):
        if site.folded and rank != DENSE:
            # What is not folded with the other half, or has no other half, keeps the head's width.
            widths.setdefault(site.module, {"qk": site.head_dim, "vo": site.head_dim})
            widths[site.module][site.kind] = rank
    return deploy == "any" or all(fuses(deploy, found["qk"], found["vo"])
                                  for found in widths.values())


def decided_together(deploy: str, sites: list[Site]) -> list[tuple[Site, ...]]:
    """Groups of sites whose ranks depend on each other: the halves of an attention, if at all."""
    if deploy == "any":
        return [(site,) for site in sites]
    return [group for _, module in groupby(sites, key=lambda site: site.module)
            for group in _split(list(module))]


def _split(sites: list[Site]) -> list[tuple[Site, ...]]:
    folded = tuple(site for site in sites if site.folded)
    return [*([folded] if folded else []), *((site,) for site in sites if not site.folded)]
