"""ComCAT's checkpoints, ranks.txt and checkpoint.pth, as a low-rank model of this library.

    ranks.txt     for each block: total QK rank, total VO rank, fc1, fc2; at the end the head,
                  which may be dense
    checkpoint    'model' beside the optimiser, its schedule, the scaler, the epoch and the parsed
                  arguments, from the search (with 'rank_alpha') or from the training after it
    w_qs, w_ks    (H·r, d), the rows of a head together; logits q kᵀ · head_dim^-½
    w_vs, proj    (H·r, d) and (d, H·r)
    first_factor  (r, in) F, bias f; last_factor (out, r) L, bias l: y = (x Fᵀ + f) Lᵀ + l

H is the number of heads, r the rank of one head or layer, head_dim that of the dense model.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adacomcat.checkpoint.build import create, require_architecture
from adacomcat.checkpoint.weights import StateDict, load_weights_, read_weights
from adacomcat.convert.install import build_skeleton
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import Rank, attention_tier
from adacomcat.utils.text import read_text

FACTORS = ".selected_rank_layer."
_ATTENTION_PARTS = ("w_qs", "w_ks", "w_vs", "proj")
_LINEAR_PARTS = ("first_factor", "last_factor")
HEAD = "head"


def import_comcat(ranks: str | Path | None, checkpoint: str | Path, architecture: str,
                  **model_args: Any) -> nn.Module:
    """The low-rank model of ComCAT's checkpoint, in eval mode; ``save`` writes its folder.

    Args:
        ranks: path of ranks.txt; None: the shapes of the weights tell the ranks.
        checkpoint: path or https address of checkpoint.pth, read with ``weights_only=True``.
        architecture: timm's name of the dense model, a plain ViT or DeiT.
        model_args: timm's keyword arguments for it.

    Raises:
        UserError: a file cannot be read or does not fit the architecture.
    """
    require_architecture(architecture)
    model = create(architecture, model_args)
    blocks = _require_plain_vit(model, architecture)
    given = None if ranks is None else read_ranks(ranks, len(blocks))
    weights = read_weights(checkpoint)
    if not any(FACTORS in name for name in weights):
        raise UserError(f"{checkpoint} is no ComCAT checkpoint: it has no key with "
                        f"'{FACTORS.strip('.')}'")
    numbers = _ranks_of(weights, blocks) if given is None else given
    plan = _plan(blocks, numbers, dense_head=f"{HEAD}.weight" in weights)
    plan.validate(model)
    _require_bias(model, plan, weights)
    build_skeleton(model, plan)
    folded = fold_weights(weights, model, plan, str(checkpoint))
    load_weights_(model, folded, str(checkpoint))
    return model.eval()


def read_ranks(path: str | Path, depth: int) -> list[int]:
    """The 4 · depth numbers of ranks.txt, and the head's where it is factorised.

    Raises:
        UserError: the file cannot be read, or holds anything else.
    """
    words = re.split(r"\s*,\s*|\s+", read_text(path).strip().strip("[]").strip())
    wrong = next((word for word in words if not re.fullmatch(r"0*[1-9][0-9]{0,8}", word)), None)
    if wrong is not None:
        raise UserError(f"{path}: {wrong!r:.40} is no rank; one line of comma-separated whole "
                        "numbers is expected")
    if len(words) not in (4 * depth, 4 * depth + 1):
        raise UserError(f"{path} holds {len(words)} ranks; this model of {depth} blocks needs "
                        f"{4 * depth + 1}: QK, VO, fc1, fc2 for each block, then the head, which "
                        "is left out where it is dense")
    return [int(word) for word in words]


def _ranks_of(weights: StateDict, blocks: list[tuple[str, Any]]) -> list[int]:
    """What ranks.txt would say, by the rows of the weights; the least rank where one is missing."""
    def rows(name: str, least: int = 1) -> int:
        shape = weights[name].shape if name in weights else ()
        return max(least, shape[0] if shape else 0)

    numbers: list[int] = []
    for name, attn in blocks:
        numbers += [rows(f"{name}.attn{FACTORS}{part}.weight", attn.num_heads)
                    for part in ("w_qs", "w_vs")]
        numbers += [rows(f"{name}.mlp.{part}{FACTORS}first_factor.weight")
                    for part in ("fc1", "fc2")]
    return [*numbers, rows(f"{HEAD}{FACTORS}first_factor.weight")]


def _require_plain_vit(model: nn.Module, architecture: str) -> list[tuple[str, Any]]:
    """(name, attention) of every block."""
    blocks: list[tuple[str, Any]] = [
        (f"blocks.{i}", getattr(block, "attn", None))
        for i, block in enumerate(getattr(model, "blocks", ()))]
    if not blocks or any(attn is None or attention_tier(attn) != "A" for _, attn in blocks):
        raise UserError(f"ComCAT compresses plain ViT and DeiT models; {architecture} is none")
    return blocks


def _plan(blocks: list[tuple[str, Any]], numbers: list[int], *,
          dense_head: bool) -> RankPlan:
    """Ranks per head from the total ranks of ranks.txt."""
    plan: dict[str, Rank] = {}
    for index, (name, attn) in enumerate(blocks):
        qk, vo, fc1, fc2 = numbers[4 * index:4 * index + 4]
        for part, total in (("qk", qk), ("vo", vo)):
            if total < attn.num_heads:
                raise UserError(f"ranks.txt gives {name}.attn a total {part} rank of {total} for "
                                f"{attn.num_heads} heads")
            plan[f"{name}.attn.{part}"] = total // attn.num_heads
        plan |= {f"{name}.mlp.fc1": fc1, f"{name}.mlp.fc2": fc2}
    if not dense_head:
        if len(numbers) == 4 * len(blocks):
            raise UserError("the head of this checkpoint is factorised, and ranks.txt does not "
                            "give its rank; append it, or leave out ranks.txt")
        plan[HEAD] = numbers[-1]
    return RankPlan(plan)


def _require_bias(model: nn.Module, plan: RankPlan, weights: StateDict) -> None:
    """Refuse a bias where the dense layer has none: a low-rank layer would have no room for it."""
    for name in plan.ranks:
        biases = [f"{name}{FACTORS}{part}.bias" for part in _LINEAR_PARTS]
        found = [key for key in biases if key in weights]
        if found and model.get_submodule(_module(name)).bias is None:
            raise UserError(f"the checkpoint has {found[0]}, but {name} has no bias in this model")


def _module(site: str) -> str:
    return site.removesuffix(".qk").removesuffix(".vo")


def fold_weights(weights: StateDict, model: nn.Module, plan: RankPlan,
                 source: str) -> StateDict:
    """The released weights under the names and in the shapes of the low-rank ``model``.

    Raises:
        UserError: the weights of a module are missing.
    """
    wanted = model.state_dict()
    modules = list(dict.fromkeys(_module(site) for site in plan.ranks))
    _require_factors(weights, modules, source)
    folded = {name: tensor for name, tensor in weights.items()
              if FACTORS not in name and not name.endswith("rank_alpha")}
    for module in modules:
        prefix = f"{module}{FACTORS}"
        layer = {name.removeprefix(prefix): tensor for name, tensor in weights.items()
                 if name.startswith(prefix)}
        _require_shapes(layer, f"{source}: {prefix}")
        fold = _fold_attention if module.endswith(".attn") else _fold_linear
        folded |= {f"{module}.{name}": tensor for name, tensor in fold(layer).items()
                   if f"{module}.{name}" in wanted}
    return folded


def _require_factors(weights: StateDict, modules: list[str], source: str) -> None:
    required = [f"{module}{FACTORS}{part}.weight" for module in modules
                for part in (_ATTENTION_PARTS if module.endswith(".attn") else _LINEAR_PARTS)]
    missing = [key for key in required if key not in weights]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise UserError(f"{source} lacks {', '.join(missing[:4])}{more}; is it a checkpoint of "
                        "this architecture?")


def _require_shapes(layer: StateDict, prefix: str) -> None:
    """Refuse weights that are no matrices, biases that are not theirs, inner ranks that differ."""
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.items()}
    for name, shape in shapes.items():
        part, _, kind = name.rpartition(".")
        weight = shapes.get(f"{part}.weight", ())
        if not (len(shape) == 2 if kind == "weight" else shape == weight[:1] != ()):
            raise UserError(f"{prefix}{name} has the shape {shape}, beside a weight of {weight}; "
                            "weights are matrices, and biases have one number for each row")
    for outer, inner in (("proj", "w_vs"), ("last_factor", "first_factor")):
        if f"{outer}.weight" in shapes:
            columns, rows = shapes[f"{outer}.weight"][1], shapes[f"{inner}.weight"][0]
            if columns != rows:
                raise UserError(f"{prefix}{outer}.weight has {columns} columns and "
                                f"{inner}.weight {rows} rows; both are the rank")


def _fold_attention(layer: StateDict) -> StateDict:
    """Weights of the low-rank attention.

    w_ks.bias adds the same number to all logits of a query, which softmax ignores. w_vs.bias
    reaches the output as a constant, so bo takes it.
    """
    wo = layer["proj.weight"]
    bo = _folded_bias(wo, layer.get("proj.bias"), layer.get("w_vs.bias"))
    wq = layer["w_qs.weight"]
    return {"wq": wq, "bq": layer.get("w_qs.bias", wq.new_zeros(len(wq))),
            "wk": layer["w_ks.weight"], "wv": layer["w_vs.weight"], "wo": wo, "bo": bo}


def _fold_linear(layer: StateDict) -> StateDict:
    u = layer["last_factor.weight"]
    bias = _folded_bias(u, layer.get("last_factor.bias"), layer.get("first_factor.bias"))
    return {"v": layer["first_factor.weight"].T, "u": u, "bias": bias}


def _folded_bias(weight: Tensor, bias: Tensor | None, inner: Tensor | None) -> Tensor:
    """bias + weight · inner: the bias of a layer whose input has the bias ``inner``."""
    if bias is None:
        bias = weight.new_zeros(len(weight))
    if inner is None:
        return bias
    return (bias.double() + weight.double() @ inner.double()).to(bias.dtype)
