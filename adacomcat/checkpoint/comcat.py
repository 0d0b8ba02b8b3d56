"""ComCAT's released checkpoints: ranks.txt and checkpoint.pth → the same function, folded.

    ranks.txt   per block: total QK rank, total VO rank, fc1, fc2; then the head
    w_qs, w_ks  (H·r, d), head-major rows; logits q kᵀ · head_dim^-½ of the dense model
    w_vs, proj  (H·r, d), (d, H·r)
    first_factor, last_factor   (r, in), (out, r): y = (x Fᵀ + f) Lᵀ + l
"""

import re
from pathlib import Path

import timm
from torch import Tensor, nn

from adacomcat.checkpoint.folder import load_weights_, read_weights, require_architecture
from adacomcat.convert.install import build_skeleton
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import attention_tier

Weights = dict[str, Tensor]

_FACTORS = ".selected_rank_layer."


def import_comcat(ranks: str | Path, checkpoint: str | Path, architecture: str,
                  **model_args: object) -> nn.Module:
    """The low-rank model of a released checkpoint, in eval mode; ``save`` writes its folder."""
    require_architecture(architecture)
    model = timm.create_model(architecture, **model_args)
    blocks = _require_plain_vit(model, architecture)
    numbers = read_ranks(ranks, len(blocks))
    weights = read_weights(checkpoint)
    if not any(_FACTORS in name for name in weights):
        raise UserError(f"{checkpoint} is no ComCAT checkpoint: it has no key with "
                        f"'{_FACTORS.strip('.')}'")
    plan = _plan(blocks, numbers)
    plan.validate(model)
    _require_bias(model, plan, weights)
    build_skeleton(model, plan)
    folded = fold_weights(weights, model, plan, str(checkpoint))
    load_weights_(model, folded, str(checkpoint))
    return model.eval()


def read_ranks(path: str | Path, depth: int) -> list[int]:
    """The 4·depth + 1 numbers of ranks.txt."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the ranks {path}: {error}") from error
    words = re.findall(r"[^\s,\[\]]+", text)
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        wrong = next(word for word in words if not (word.isdecimal() and int(word) > 0))
        raise UserError(f"{path}: {wrong!r} is no rank; one line of comma-separated whole numbers "
                        "is expected")
    if len(words) != 4 * depth + 1:
        raise UserError(f"{path} holds {len(words)} ranks; this model of {depth} blocks needs "
                        f"{4 * depth + 1}: QK, VO, fc1, fc2 for each block, then the head")
    return [int(word) for word in words]


def _require_plain_vit(model: nn.Module, architecture: str) -> list[tuple[str, nn.Module]]:
    """(name, attention) of every block."""
    blocks = [(f"blocks.{i}", getattr(block, "attn", None))
              for i, block in enumerate(getattr(model, "blocks", ()))]
    if not blocks or any(attn is None or attention_tier(attn) != "A" for _, attn in blocks):
        raise UserError(f"ComCAT compresses plain ViT and DeiT models; {architecture} is none")
    return blocks


def _plan(blocks: list[tuple[str, nn.Module]], numbers: list[int]) -> RankPlan:
    plan = {}
    for (name, attn), (qk, vo, fc1, fc2) in zip(
            blocks, zip(*[iter(numbers[:-1])] * 4, strict=True), strict=True):
        for part, total in (("qk", qk), ("vo", vo)):
            if total < attn.num_heads:
                raise UserError(f"ranks.txt gives {name}.attn a total {part} rank of {total} for "
                                f"{attn.num_heads} heads")
            plan[f"{name}.attn.{part}"] = total // attn.num_heads
        plan |= {f"{name}.mlp.fc1": fc1, f"{name}.mlp.fc2": fc2}
    return RankPlan(plan | {"head": numbers[-1]})


def _require_bias(model: nn.Module, plan: RankPlan, weights: Weights) -> None:
    """A linear site of ours has a bias exactly where the dense layer has one."""
    for name in plan.ranks:
        biases = [f"{name}{_FACTORS}{part}.bias" for part in ("first_factor", "last_factor")]
        found = [key for key in biases if key in weights]
        if found and model.get_submodule(_module(name)).bias is None:
            raise UserError(f"the checkpoint has {found[0]}, but {name} has no bias in this model")


def _module(site: str) -> str:
    return site.removesuffix(".qk").removesuffix(".vo")


def fold_weights(weights: Weights, model: nn.Module, plan: RankPlan, source: str) -> Weights:
    """The released weights under the names and in the shapes of the folded model."""
    wanted = model.state_dict()
    modules = list(dict.fromkeys(_module(site) for site in plan.ranks))
    required = [f"{module}{_FACTORS}{part}.weight" for module in modules
                for part in (("w_qs", "w_ks", "w_vs", "proj") if module.endswith(".attn")
                             else ("first_factor", "last_factor"))]
    missing = [key for key in required if key not in weights]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise UserError(f"{source} lacks {', '.join(missing[:4])}{more}; is it a checkpoint of "
                        "this architecture?")
    folded = {name: tensor for name, tensor in weights.items()
              if _FACTORS not in name and not name.endswith("rank_alpha")}
    for module in modules:
        prefix = f"{module}{_FACTORS}"
        layer = {name.removeprefix(prefix): tensor for name, tensor in weights.items()
                 if name.startswith(prefix)}
        fold = _fold_attention if module.endswith(".attn") else _fold_linear
        folded |= {f"{module}.{name}": tensor for name, tensor in fold(layer).items()
                   if f"{module}.{name}" in wanted}
    return folded


def _fold_attention(layer: Weights) -> Weights:
    """w_ks.bias adds the same to all logits of a query and cancels; w_vs.bias passes into bo."""
    wo = layer["proj.weight"]
    bo = layer.get("proj.bias", wo.new_zeros(len(wo)))
    if "w_vs.bias" in layer:
        bo = (bo.double() + wo.double() @ layer["w_vs.bias"].double()).to(bo.dtype)
    wq = layer["w_qs.weight"]
    return {"wq": wq, "bq": layer.get("w_qs.bias", wq.new_zeros(len(wq))),
            "wk": layer["w_ks.weight"], "wv": layer["w_vs.weight"], "wo": wo, "bo": bo}


def _fold_linear(layer: Weights) -> Weights:
    u = layer["last_factor.weight"]
    bias = layer.get("last_factor.bias", u.new_zeros(len(u)))
    if "first_factor.bias" in layer:
        bias = (bias.double() + u.double() @ layer["first_factor.bias"].double()).to(bias.dtype)
    return {"v": layer["first_factor.weight"].T, "u": u, "bias": bias}
