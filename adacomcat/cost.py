"""What a model costs, counted: parameters and multiply-accumulates.

Multiply-accumulates are those of every matrix product, convolution and attention that one image
goes through, as PyTorch dispatches them, whatever modules they belong to. Sums and elementwise
work do not count.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from adacomcat.layers.quantized import QuantizedLinear
from adacomcat.layers.registry import example
from adacomcat.moved import forward
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, Rank, Site
from adacomcat.utils.inputs import call
from adacomcat.utils.model import evaluating

Tokens = dict[str, tuple[int, int]]


class Work(NamedTuple):
    """What one image costs.

    macs: multiply-accumulates of the whole model.
    tokens: module name → (rows that it sees, rows that attend to each other).
    """

    macs: int
    tokens: Tokens


def model_params(model: nn.Module) -> int:
    """Weights and biases, also those of quantised layers; their scales do not count."""
    return (sum(parameter.numel() for parameter in model.parameters())
            + sum(module.in_features * module.out_features for module in model.modules()
                  if isinstance(module, QuantizedLinear)))


def model_bytes(model: nn.Module) -> int:
    """What a state dict holds, scales of quantised weights among it."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def plan_params(model: nn.Module, plan: RankPlan) -> int:
    """Parameters that ``model`` will have under ``plan``."""
    sites = plan.sites(model)
    fixed = model_params(model) - sum(site.dense_params for site in sites)
    return fixed + plan.params(sites)


@torch.no_grad()
def work(model: nn.Module, names: Iterable[str] = ()) -> Work:
    """Run ``model`` once on one image, and count.

    Args:
        model: a model whose input size ``input_size`` knows; it keeps its mode.
        names: modules whose tokens are asked for.
    """
    seen: Tokens = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            rows = x.numel() // x.shape[-1] + seen.get(name, (0, 0))[0]
            seen[name] = (rows, x.shape[-2] if x.ndim > 2 else 1)
        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
             for name in set(names)]
    counter = _Counter()
    try:
        with evaluating(model), _visible_products(model), counter:
            call(model, example(model))
    finally:
        for hook in hooks:
            hook.remove()
    return Work(counter.flops // 2, seen)


def model_macs(model: nn.Module) -> int:
    """Multiply-accumulates of one image."""
    return work(model).macs


def site_macs(site: Site, rank: Rank, tokens: Tokens) -> int:
    return site.macs(rank, *tokens.get(site.module, (0, 0)))


def plan_macs(model: nn.Module, plan: RankPlan) -> int:
    """Multiply-accumulates of one image that ``model`` will have under ``plan``."""
    sites = plan.sites(model)
    done = work(model, (site.module for site in sites))
    return done.macs + sum(site_macs(site, plan[site.name], done.tokens)
                           - site_macs(site, DENSE, done.tokens) for site in sites)


@contextlib.contextmanager
def _visible_products(model: nn.Module) -> Iterator[None]:
    """Inside, no kernel of PyTorch hides several products from the counter.

    The fast path of ``nn.MultiheadAttention`` does, and on CPUs that of recurrent layers.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    plain = (torch.backends.mkldnn.flags(enabled=False) if recurrent
             else contextlib.nullcontext())
    try:
        with plain:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Counter(TorchDispatchMode):
    """Floating-point operations of what PyTorch dispatches, by its own formulas.

    ``FlopCounterMode`` follows modules and gradients, too, at which some models fail.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        formula = flop_registry.get(packet)
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif formula is None:
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        found = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=found)
        return found


# Names that left this module; their old place works for one more release.
__getattr__ = forward(__name__, ("utils.model", "latency.timing"))
