"""A low-rank model in ComCAT's layout: ranks.txt and checkpoint.pth, which its program loads.

Its layers hold factors without choice, so a dense layer is written as the product of itself and an
identity, and a dense attention at its full rank. For the layout see ``checkpoint/comcat.py``.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adacomcat.checkpoint.comcat import FACTORS, HEAD, import_comcat
from adacomcat.checkpoint.folder import describe, require_empty
from adacomcat.checkpoint.weights import StateDict
from adacomcat.errors import UserError
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.registry import attention_parts, attention_tier
from adacomcat.utils.files import atomic_folder
from adacomcat.utils.model import copied, input_size

CHECKPOINT, RANKS = "checkpoint.pth", "ranks.txt"
# Their activations, norms and poolings are those of ComCAT's models, whatever a model's name.
PLAIN, PLAIN_DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
# All that ComCAT's Vision Transformer holds beside the factors.
_KNOWN = re.compile(r"(cls_token|dist_token|pos_embed|patch_embed\.proj\.(weight|bias)"
                    r"|(blocks\.\d+\.norm[12]|norm)\.(weight|bias)|head_dist\.(weight|bias))")


@torch.no_grad()
def save_comcat(model: nn.Module, folder: str | Path) -> None:
    """Write ``model`` as ComCAT's program does; it loads it with --attn2-with-bias.

    What was written is read back and compared on a random image first.

    Args:
        model: a plain ViT or DeiT of timm, compressed or not; its MLPs have all their neurons.
        folder: absent or empty.

    Raises:
        UserError: the model holds what ComCAT's has no place for, or the folder cannot be written.
    """
    require_empty(folder)
    architecture, model_args = _source(model)
    weights, ranks = _factors(model)
    _require_known(model, weights)
    try:
        with atomic_folder(folder, last=CHECKPOINT) as scratch:
            (scratch / RANKS).write_text(",".join(map(str, ranks)) + "\n", encoding="utf-8")
            arguments = argparse.Namespace(model=architecture, attn2_with_bias=True)
            torch.save({"model": weights, "epoch": 0, "args": arguments}, scratch / CHECKPOINT)
            plain = PLAIN_DISTILLED if "dist_token" in weights else PLAIN
            _require_same(model, import_comcat(scratch / RANKS, scratch / CHECKPOINT, plain,
                                               **model_args))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; name another place, or "
                        "mend this one") from error


def _source(model: Any) -> tuple[str, dict[str, Any]]:
    """timm's name of the dense model, and the sizes that tell it from the plainest of its kind."""
    config = describe(model, None, None)
    args = config["model_args"]
    blocks = _blocks(model)
    sizes = {name: args[name] for name in ("num_classes", "in_chans", "img_size") if name in args}
    return args.get("base", config["architecture"]), sizes | {
        "patch_size": model.patch_embed.patch_size, "embed_dim": model.embed_dim,
        "depth": len(blocks), "num_heads": blocks[0].attn.num_heads}


def _factors(model: Any) -> tuple[StateDict, list[int]]:
    """The factors of all blocks and of the head under ComCAT's names, and ranks.txt."""
    weights: StateDict = {}
    ranks: list[int] = []

    def add(name: str, layer: StateDict, ranked: tuple[str, ...]) -> None:
        weights.update({f"{name}{FACTORS}{key}": tensor.detach().cpu().contiguous()
                        for key, tensor in layer.items()})
        ranks.extend(len(layer[f"{key}.weight"]) for key in ranked)

    for index, block in enumerate(_blocks(model)):
        name = f"blocks.{index}"
        add(f"{name}.attn", _attention(block.attn, f"{name}.attn"), ("w_qs", "w_vs"))
        for part in ("fc1", "fc2"):
            layer = _linear(getattr(block.mlp, part, None), f"{name}.mlp.{part}")
            add(f"{name}.mlp.{part}", layer, ("first_factor",))
    add(HEAD, _linear(getattr(model, HEAD, None), HEAD), ("first_factor",))
    others = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()
              if not re.match(rf"blocks\.\d+\.(attn|mlp)\.|{HEAD}\.", name)}
    return others | weights, ranks


def _blocks(model: Any) -> Any:
    blocks = getattr(model, "blocks", ())
    if not len(blocks) or not all(hasattr(block, part) for block in blocks
                                  for part in ("attn", "mlp")):
        raise UserError(f"ComCAT has plain ViT and DeiT models only; {type(model).__name__} is "
                        "none")
    return blocks


def _attention(attn: nn.Module, name: str) -> StateDict:
    """w_qs, w_ks, w_vs and proj with all biases; the scale is that of ComCAT, head_dim^-½."""
    if isinstance(attn, LowRankAttention) and attn.folds_scores:
        scale, dim = attn.scale, attn.wq.shape[1]
        q, bq, k, v = attn.wq, attn.bq, attn.wk, attn.wv
        out, bo, bk, bv = attn.wo, attn.bo, None, None
        heads = attn.num_heads
    elif attention_tier(attn) == "A":
        parts = attention_parts(attn)
        scale, dim, heads = parts.scale, parts.dim, parts.num_heads
        (q, bq), (k, bk), (v, bv), (out, bo) = (
            (part.weight, part.bias) for part in (parts.q, parts.k, parts.v, parts.out))
    else:
        raise UserError(f"ComCAT folds plain attentions only, and {name} is a "
                        f"{type(attn).__name__}")
    factor = scale * (dim // heads) ** 0.5
    biases = {"w_qs": None if bq is None else bq * factor, "w_ks": bk, "w_vs": bv, "proj": bo}
    layer = {"w_qs": q * factor, "w_ks": k, "w_vs": v, "proj": out}
    return _with_biases(layer, biases)


def _linear(linear: Any, name: str) -> StateDict:
    """first_factor and last_factor of one layer; one of them is an identity where it is dense."""
    if isinstance(linear, LowRankLinear):
        first, last, bias = linear.v.T, linear.u, linear.bias
    elif type(linear) is nn.Linear:
        rows, columns = linear.weight.shape
        identity = torch.eye(min(rows, columns), dtype=linear.weight.dtype,
                             device=linear.weight.device)
        first, last = (linear.weight, identity) if rows <= columns else (identity, linear.weight)
        bias = linear.bias
    else:
        raise UserError(f"ComCAT has linear layers only, and {name} is a {type(linear).__name__}")
    layer = _with_biases({"last_factor": last}, {"last_factor": bias})
    return {"first_factor.weight": first} | layer


def _with_biases(weights: dict[str, Tensor], biases: dict[str, Tensor | None]) -> StateDict:
    """Weights and biases by their names; a bias that lacks is zero."""
    found: StateDict = {}
    for name, weight in weights.items():
        bias = biases[name]
        found[f"{name}.weight"] = weight
        found[f"{name}.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
    return found


def _require_known(model: Any, weights: StateDict) -> None:
    """Refuse parameters that ComCAT's program would drop without a word, and other poolings."""
    unknown = [name for name in weights if FACTORS not in name and not _KNOWN.fullmatch(name)]
    if unknown:
        raise UserError(f"ComCAT's Vision Transformer has no place for {', '.join(unknown[:3])}")
    if getattr(model, "global_pool", "token") != "token":
        raise UserError(f"ComCAT's Vision Transformer reads the class token, and this model's "
                        f"global_pool is {model.global_pool!r}")
    for index in range(len(model.blocks)):
        fc1, fc2 = (weights[f"blocks.{index}.mlp.{part}{FACTORS}{factor}_factor.weight"]
                    for part, factor in (("fc1", "last"), ("fc2", "first")))
        if len(fc1) != 4 * model.embed_dim or fc2.shape[1] != len(fc1):
            raise UserError(f"blocks.{index}.mlp has {len(fc1)} hidden neurons, and ComCAT's MLPs "
                            f"have {4 * model.embed_dim}: compress MLPs to ranks, without "
                            "calibration images or by a plan of fc1 and fc2")


def _require_same(model: nn.Module, written: nn.Module) -> None:
    """Compare both on one image: activations and norms' epsilons are in no state dict."""
    image = torch.randn(1, *input_size(model), generator=torch.Generator().manual_seed(0))
    expected = copied(model).cpu().float().eval()(image)
    found = written.float()(image)
    largest = expected.abs().max().item()
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * largest, equal_nan=True):
        raise UserError("ComCAT's Vision Transformer computes something else than this model")
