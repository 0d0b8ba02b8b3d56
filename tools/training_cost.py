"""What a training run moves over network and disk, from the bytes of its tensors.

    python tools/training_cost.py    # the tables of docs/many-machines.md

Models stand on the meta device: their tensors have sizes and no values. The formulas are those of
rings: an all-reduce sends 2 (W - 1) / W of its bytes from each of W processes, a gather or a
scatter half of that. tests/distill/test_training_cost.py compares them with what is sent.
"""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from adacomcat.convert.factors import blank_factors
from adacomcat.search.supernet import build_supernet
from adacomcat.sites import find_sites, prunable_mlps

MODELS = {"ViT-L/16": "vit_large_patch16_224", "ViT-H/14": "vit_huge_patch14_224",
          "ViT-g/14": "vit_giant_patch14_224", "ViT-G/14": "vit_gigantic_patch14_224"}
PROCESSES = (8, 64, 512)
MOMENTS = 2  # tensors that AdamW keeps of each parameter


class Sizes(NamedTuple):
    """Bytes of what a search trains, in float32."""

    dense: int  # the model, which is its own teacher
    trained: int  # parameters of the supernet
    buffers: int  # that the supernet has beside them

    @property
    def state(self) -> int:
        """The file that --resume reads, but for a few kilobytes."""
        return (1 + MOMENTS) * self.trained + self.buffers

    def sent(self, parallel: str, processes: int) -> float:
        """From one process in one step."""
        whole = (processes - 1) / processes
        if parallel == "fsdp":  # parameters twice, gradients once; the teacher's parameters once
            return whole * (3 * self.trained + self.dense)
        return 2 * whole * self.trained

    def held(self, parallel: str, processes: int) -> float:
        """Weights, gradients and moments of one process, without activations."""
        everything = (2 + MOMENTS) * self.trained + self.dense
        return self.buffers + everything / (processes if parallel == "fsdp" else 1)


def sizes(architecture: str, **model_args: Any) -> Sizes:
    """Those of the supernet that a search of this model trains, with widths of MLPs."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = timm.create_model(architecture, **model_args)
    sites = find_sites(model, prunable_mlps(model))
    supernet = build_supernet(model, blank_factors(model, sites), sites)
    return Sizes(_bytes(model.parameters()), _bytes(supernet.parameters()),
                 _bytes(supernet.buffers()))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def table() -> str:
    """Model × what it moves, in gigabytes."""
    header = ("model", "trained", "state", "sent a step: `average`, `ddp`", "sent a step: `fsdp`",
              "held: `average`, `ddp`", *(f"held: `fsdp`, {count} GPUs" for count in PROCESSES))
    lines = [header, ["---"] * len(header)]
    for name, architecture in MODELS.items():
        found = sizes(architecture)
        figures = [found.trained, found.state,
                   *(_range(found, parallel) for parallel in ("average", "fsdp")),
                   found.held("average", 1),
                   *(found.held("fsdp", count) for count in PROCESSES)]
        lines.append((name, *(figure if isinstance(figure, str) else f"{figure / 1e9:.1f}"
                              for figure in figures)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _range(found: Sizes, parallel: str) -> str:
    few, many = (found.sent(parallel, count) / 1e9 for count in (PROCESSES[0], PROCESSES[-1]))
    return f"{few:.1f} … {many:.1f}"


if __name__ == "__main__":
    print(table())
