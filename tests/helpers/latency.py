"""Models to time, and a model of cost that stands for the clock."""

from collections.abc import Callable, Mapping

import timm
from torch import nn

from adacomcat.latency.timing import Call, deployed

ARCHITECTURE = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 5}
MODELS = {  # with and without blocks that fuse; tiers A, B and C
    "vit": (ARCHITECTURE, TINY),
    "all tokens": (ARCHITECTURE, TINY | {"global_pool": "", "num_classes": 0}),
    "normed queries": (ARCHITECTURE, TINY | {"qk_norm": True}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 24, "depths": (2, 2),
                                             "num_heads": (2, 4), "num_classes": 5}),
    "rotary": ("vit_small_patch16_dinov3", {"img_size": 32, "embed_dim": 64, "depth": 2,
                                           "num_heads": 2}),
}


def make(name: str = "vit") -> nn.Module:
    architecture, settings = MODELS[name]
    return timm.create_model(architecture, **settings).eval()


class CostModel:
    """0.02 ms a call and 1 ms for 10⁵ weights; of whole models ``factor`` times that."""

    def __init__(self, factor: float = 1.3, weigh: Callable[[str], float] = lambda name: 1.0):
        self.factor, self.weigh = factor, weigh
        self.timed: list[str] = []

    def __call__(self, calls: Mapping[str, Call]) -> dict[str, float]:
        self.timed += calls
        return {key: self.milliseconds(call) for key, call in calls.items()}

    def milliseconds(self, call: Call) -> float:
        # Not the parameters: packed weights are none.
        weights = sum(self.weigh(name) * weight.numel()
                      for name, weight in call.module.state_dict().items())
        return 0.02 + (self.factor if call.method == "__call__" else 1.0) * weights / 1e5

    def of(self, model: nn.Module) -> float:
        return self.milliseconds(Call(deployed(model), "__call__", (), {}))


class Int8Cost(CostModel):
    """The same where weights are float; on int8 they take a third of the time."""

    def milliseconds(self, call: Call) -> float:
        names = set(call.module.state_dict())
        self.weigh = lambda name: 1 / 3 if f"{name}_scale" in names else 1.0
        return super().milliseconds(call)
