"""A fused block that keeps the names which another library gives to the halves of its block."""

from torch import nn

from adacomcat.layers.fused import FusedBlock


class NamedBlock(FusedBlock):
    """``FusedBlock`` whose attention has the name ``attention`` in the place of 'attn'."""

    def __init__(self, attn: nn.Module, mlp: nn.Module, attention: str) -> None:
        nn.Module.__init__(self)
        self.attention_name = attention
        self.add_module(attention, attn)
        self.mlp = mlp

    @property
    def attn(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.get_submodule(self.attention_name)
