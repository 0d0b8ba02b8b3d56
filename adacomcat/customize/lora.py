"""diffusers' LoRA as adapters, which is exact, and adapters as LoRA, which is an approximation.

LoRA changes single projections, W + B A. Per head, with Wq' = Wq + Bq Aq and so on,

    Wq'ᵀ Wk' = Wqᵀ Wk + Aqᵀ (Bqᵀ Wk') + (Wqᵀ Bk) Ak
    Wo' Wv'  = Wo Wv + (Wo' Bv) Av + Bo (Ao Wv)

so a LoRA of rank R beside q, k, v and o is an adapter of rank 2 R per head. The other way round the
factors need not lie in the space of Wk and Wo: their nearest ones there are taken. In joint
attentions the projections of pictures and text share heads, and neither way is offered.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from adacomcat.customize.adapter import TOKENS, Projections
from adacomcat.customize.adapters import DEFAULT, adapters_of, attentions, denoiser, processors
from adacomcat.customize.files import put
from adacomcat.customize.places import adapts_queries, is_diffusion, projections_of
from adacomcat.errors import UserError, reason

_DOWN, _UP = (".lora_A.weight", ".lora.down.weight"), (".lora_B.weight", ".lora.up.weight")
_NAMES = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}
Changes = dict[str, tuple[Tensor, Tensor]]  # projection → (A, B)


def from_lora(target: Any, lora: str | Path | Mapping[str, Tensor], name: str = DEFAULT) -> None:
    """Make an adapter that computes what a LoRA of the attentions computes.

    Args:
        target: a pipeline or module, without that LoRA.
        lora: a .safetensors file of diffusers or peft, or its tensors.
        name: to know the adapter by.

    Raises:
        UserError: the LoRA changes something else than attentions, or a bias forbids the form.
    """
    source = "the LoRA" if isinstance(lora, Mapping) else str(lora)
    places = attentions(target)
    tensors: dict[str, Tensor] = {}
    for place, changes in _changes(_tensors(lora), places, source).items():
        attention = places[place]
        parts = _factors(place, _only_projections(attention, place), changes, attention.heads,
                         adapts_queries(attention))
        rank = max(rows.shape[1] for rows in parts.values())
        for key, rows in parts.items():  # (heads, rank, width)
            padded = F.pad(rows, (0, 0, 0, rank - rows.shape[1])).flatten(0, 1)
            tensors[f"{place}.{TOKENS}.{key}"] = padded.T if key == "o" else padded
    put(target, tensors, name, source)


def _only_projections(attention: Any, place: str) -> Projections:
    if not is_diffusion(attention):
        raise UserError(f"{place} is an attention of a ViT, between whose LoRA and adapters "
                        "nothing converts; keep what you have")
    found = projections_of(attention)
    if len(found) > 1:
        raise UserError(f"{place} is a joint attention, between whose LoRA and adapters nothing "
                        "converts; keep what you have")
    return found[TOKENS]


def _tensors(lora: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(lora, Mapping):
        return lora
    try:
        return load_file(lora)
    except Exception as error:  # of the file system, or of a damaged header
        raise UserError(f"cannot read the LoRA {lora}: {reason(error)}") from error


def _changes(tensors: Mapping[str, Tensor], places: Mapping[str, Any],
             source: str) -> dict[str, Changes]:
    """Attention → what changes there; B has LoRA's own scale in it."""
    found: dict[str, Changes] = {}
    for key, down in tensors.items():
        ending = next((ending for ending in _DOWN if key.endswith(ending)), None)
        if ending is None:
            if not key.endswith((*_UP, ".alpha")):
                raise UserError(f"{source}: {key:.80} is no part of a LoRA")
            continue
        stem = key.removesuffix(ending)
        up = tensors.get(stem + _UP[_DOWN.index(ending)])
        where = _where(stem.removeprefix("unet.").removeprefix("transformer."), places)
        if up is None or where is None:
            raise UserError(f"{source} changes {stem:.80}, which is no projection of an attention "
                            "of this model")
        place, projection = where
        scale = tensors[f"{stem}.alpha"].item() / len(down) if f"{stem}.alpha" in tensors else 1.0
        found.setdefault(place, {})[projection] = (down, scale * up)
    if not found:
        raise UserError(f"{source} changes nothing")
    return found


def _where(stem: str, places: Mapping[str, Any]) -> tuple[str, str] | None:
    """(attention, projection) of 'blocks.0.attn.to_out.0'."""
    for ending, projection in _NAMES.items():
        place = stem.removesuffix(f".{ending}")
        if place != stem and place in places:
            return place, projection
    return None


def _factors(place: str, frozen: Projections, changes: Changes, heads: int,
             queries: bool) -> dict[str, Tensor]:
    """Factor → (heads, rank, width); for 'o' the columns stand as rows."""
    if ("k" in changes and frozen.q.bias is not None) \
            or ("out" in changes and frozen.v.bias is not None):
        raise UserError(f"{place} has biases, through which this LoRA adds what adapters cannot; "
                        "keep it as a LoRA")
    if not queries and ("q" in changes or "k" in changes):
        raise UserError(f"{place} normalises or rotates queries and keys, so adapters leave them; "
                        "keep the LoRA as it is")
    w = {name: linear.weight.detach().double() for name, linear in frozen._asdict().items()
         if linear is not None}

    def split(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (heads, -1))

    def change(name: str) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) in double precision; R is 0 where nothing changes."""
        if name in changes:
            return changes[name][0].to(w[name]), changes[name][1].to(w[name])
        return w[name].new_zeros(0, w[name].shape[1]), w[name].new_zeros(w[name].shape[0], 0)

    def every(rows: Tensor) -> Tensor:
        return rows.expand(heads, *rows.shape)

    (av, bv), found = change("v"), {}
    found["v"] = every(av)
    if "out" in w:
        ao, bo = change("out")
        ao_h, out = split(ao.T).mT, split((w["out"] + bo @ ao).T)
        found["v"] = torch.cat([every(av), ao_h @ split(w["v"])], 1)
        found["o"] = torch.cat([split(bv).mT @ out, every(bo.T)], 1)
    if queries:
        (aq, bq), (ak, bk) = change("q"), change("k")
        found["q"] = torch.cat([every(aq), split(bk).mT @ split(w["q"])], 1)
        found["k"] = torch.cat([split(bq).mT @ split(w["k"] + bk @ ak), every(ak)], 1)
    return found


def to_lora(target: Any, name: str = DEFAULT) -> tuple[dict[str, Tensor], float]:
    """A LoRA of diffusers near an adapter, of rank heads · r beside q and v.

    Args:
        target: a pipeline or module with the adapter.
        name: of the adapter.

    Returns:
        The tensors as peft names them, and the relative error: the largest part of a factor's norm
        that no LoRA of these projections can give.

    Raises:
        UserError: there is no such adapter.
    """
    tensors: dict[str, Tensor] = {}
    worst = 0.0
    model, prefix = denoiser(target), "transformer." if hasattr(target, "transformer") else "unet."
    for where, adapter in adapters_of(target, name).items():
        place = where.rpartition(".")[0]
        attention: Any = model.get_submodule(place)
        alpha = processors(target)[place].alphas[name]
        frozen = _only_projections(attention, place)
        pairs: list[tuple[str, nn.Parameter, Tensor, Tensor]] = []
        if adapter.q is not None and adapter.k is not None:
            pairs.append(("to_q", adapter.q, frozen.k.weight, adapter.k))
        if adapter.o is not None and frozen.out is not None:
            pairs.append(("to_v", adapter.v, frozen.out.weight.T, adapter.o.T))
        for projection, down, partner, wanted in pairs:
            up, error = _nearest(partner, wanted, attention.heads)
            worst = max(worst, error)
            stem = f"{prefix}{place}.{projection}"
            tensors[f"{stem}.lora_A.weight"] = down.detach().clone()
            tensors[f"{stem}.lora_B.weight"] = alpha**2 * up.to(down)
    return tensors, worst


@torch.no_grad()
def _nearest(partner: Tensor, wanted: Tensor, heads: int) -> tuple[Tensor, float]:
    """B (H·d, H·r), zero between heads, whose Bᵀ partner is nearest to ``wanted``; the error.

    Args:
        partner: the frozen rows (H·d, width) that multiply the change.
        wanted: the adapter's rows (H·r, width).
        heads: H.
    """
    frozen = partner.double().unflatten(0, (heads, -1))
    rows = wanted.double().unflatten(0, (heads, -1))
    blocks = (rows @ torch.linalg.pinv(frozen)).mT
    left = (blocks.mT @ frozen - rows).norm() / rows.norm().clamp_min(1e-300)
    return torch.block_diag(*blocks), float(left)
