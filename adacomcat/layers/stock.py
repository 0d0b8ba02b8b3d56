"""Low-rank layers in modules of PyTorch's own, which quantisers and adapters understand.

A drop-in's ``to_plain`` makes them from its factors, its ``from_plain`` takes them back. They run
no kernel of this package before ``optimize`` fuses them.
"""

from collections.abc import Container
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function

from adacomcat.errors import UserError
from adacomcat.layers.plain import is_plain_linear
from adacomcat.ops.reference import broadcast_mask, probability


class LinearPair(nn.Sequential):
    """y = (x Vᵀ) Uᵀ + b in two linear layers: '0' has the weight Vᵀ (r, in), '1' U (out, r) and b.

    The attributes are those that code reads of an ``nn.Linear``.
    """

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__(first, second)
        self.in_features, self.out_features = first.in_features, second.out_features
        self.rank = first.out_features


class PlainAttention(nn.Module):
    """The function of a ``LowRankAttention`` in four linear layers and PyTorch's attention.

    q, k: (..., d) → (..., H·rank_qk), v: (..., d) → (..., H·rank_vo), proj: → (..., out). Either of
    q and k may be a ``LinearPair``. Everything else that the drop-in has keeps its name.

    Subclasses override ``forward``, with the arguments of a library. TorchScript compiles it.

    Args:
        low_rank: The drop-in.
        q: Its query projection.
        k: Its key projection.
    """

    num_heads: int
    rank_qk: int
    rank_vo: int
    scale: float

    if TYPE_CHECKING:  # TorchScript asks for no types of what it finds in the module
        attn_drop: nn.Dropout
        proj_drop: nn.Module

    def __init__(self, low_rank: Any, q: nn.Module, k: nn.Module) -> None:
        super().__init__()
        carry_over_(low_rank, self, FACTORS)
        self.made_from = type(low_rank)
        self.q, self.k = q, k
        self.v = linear_of(low_rank.wv)
        self.proj = linear_of(low_rank.wo, low_rank.bo)
        self.train(low_rank.training)

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, H·r) → (B, H, N, r)."""
        return x.unflatten(-1, [self.num_heads, -1]).transpose(1, 2)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """The result for tokens x (B, N, d), q and k (B, H, N, r).

        ``mask``: boolean, or added to the logits.
        """
        if not torch.jit.is_scripting():  # alone, so that TorchScript passes over what follows
            if weights_are_read(self.attn_drop, x):
                weights = self.attn_drop(softmax_weights(q, k, self.scale, mask))
                y = weights @ self.heads(self.v(x))
                return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        y = F.scaled_dot_product_attention(
            q, k, self.heads(self.v(x)), attn_mask=mask, scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None,
                is_causal: bool = False) -> Tensor:
        """Tokens (B, N, d) → (B, N, out)."""
        mask = causal_mask(attn_mask, x, is_causal)
        return self.attend(x, self.heads(self.q(x)), self.heads(self.k(x)), mask)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, rank_qk={self.rank_qk}, rank_vo={self.rank_vo}"


# What a drop-in and its plain form call differently.
FACTORS = frozenset(("wq", "bq", "wk", "wv", "wo", "bo", "q", "k", "v", "proj", "made_from"))


def causal_mask(mask: Tensor | None, x: Tensor, is_causal: bool) -> Tensor | None:
    """``mask``, or the lower triangle (N, N) for tokens x (B, N, d) where ``is_causal``."""
    if not torch.jit.is_scripting():
        if has_torch_function((mask, x)):  # one node for torch.fx
            return handle_torch_function(causal_mask, (mask, x), mask, x, is_causal)
    if not is_causal:
        return mask
    tokens = x.shape[1]
    return torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()


def weights_are_read(attn_drop: nn.Module, x: Tensor) -> bool:
    """Whether somebody looks at the attention weights: by a hook on ``attn_drop``, or by fx.

    timm's ``AttentionExtract`` does either. No fused attention writes them.
    """
    hooks = attn_drop._forward_hooks or attn_drop._forward_pre_hooks
    return bool(hooks) or isinstance(x, Proxy)


def softmax_weights(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(scale q kᵀ + mask), (B, H, N, N)."""
    if isinstance(q, Proxy):
        return masked_logits((q * scale) @ k.transpose(-2, -1), mask).softmax(-1)
    return probability(q, k, scale, broadcast_mask(mask))


def masked_logits(logits: Tensor, mask: Tensor | None) -> Tensor:
    """``logits`` under a mask, which is boolean or added."""
    if has_torch_function((logits, mask)):  # torch.fx does not know whether there is a mask
        return handle_torch_function(masked_logits, (logits, mask), logits, mask)
    if mask is None:
        return logits
    return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask


def refuse_scripting(module: nn.Module) -> NoReturn:
    """What ``torch.jit.script`` calls first: it would replace layers in the model that it is given.

    Raises:
        UserError: always.
    """
    raise UserError(f"torch.jit.script does not take a {type(module).__name__}; script "
                    "adacomcat.to_plain(model) instead, which holds the same factors")


def carry_over_(source: nn.Module, target: nn.Module, without: Container[str]) -> None:
    """Give ``target`` the children, parameters, buffers and settings of ``source``, by name."""
    for name, child in source.named_children():
        if name not in without:
            setattr(target, name, child)
    for name, parameter in source._parameters.items():
        if name not in without:
            target.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        target.register_buffer(name, buffer, name not in source._non_persistent_buffers_set)
    for name, value in vars(source).items():
        if not name.startswith("_") and name != "training" and name not in without:
            setattr(target, name, value)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """x ↦ x weightᵀ + bias, of the same numbers; it trains where they do."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().contiguous(), weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return made


def weights_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of a linear layer.

    Raises:
        UserError: It is no plain one any more.
    """
    if not (isinstance(linear, nn.Linear) and is_plain_linear(linear)):
        raise UserError(f"a {type(linear).__name__} stands where to_plain put an nn.Linear, "
                        "quantised or with an adapter: factors cannot be read from it; merge or "
                        "remove it first")
    return linear.weight, linear.bias
