"""A library whose version is not known is treated as any other module, and one line says so."""

import pytest
from torch import nn

from adacomcat import find_sites
from adacomcat.layers import registry


def test_an_unknown_version_leaves_its_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(8, 8)

    monkeypatch.setattr(Attention, "__module__", "some_library.models")
    monkeypatch.setitem(registry._FAMILIES, "some_library", "adacomcat.families.some_library")
    with pytest.warns(UserWarning, match="does not know the classes of this version of some_lib"):
        assert [site.name for site in find_sites(nn.Sequential(Attention()))] == ["0.q_proj"]
    assert "some_library" not in registry._FAMILIES  # asked once
