"""What a training run moves over network and disk, from the bytes of its tensors.

    python tools/training_cost.py    # the tables of docs/many-machines.md

Models stand on the meta device: their tensors have sizes and no values. The formula is that of a
ring: an all-reduce sends 2 (W - 1) / W of its bytes from each of W processes.
tests/distill/test_training_cost.py compares it with what a process hands over.
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

    def sent(self, processes: int) -> float:
        """From one process in one step."""
        return 2 * (processes - 1) / processes * self.trained

    @property
    def held(self) -> int:
        """Weights, gradients and moments of one process, without activations."""
        return self.buffers + (2 + MOMENTS) * self.trained + self.dense


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
    header = ("model", "trained", "state", "held",
              *(f"sent a step, {count} GPUs" for count in PROCESSES))
    lines = [header, ["---"] * len(header)]
    for name, architecture in MODELS.items():
        found = sizes(architecture)
        figures = (found.trained, found.state, found.held, *map(found.sent, PROCESSES))
        lines.append((name, *(f"{figure / 1e9:.1f}" for figure in figures)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
