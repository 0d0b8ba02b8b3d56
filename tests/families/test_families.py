"""A class of attention that no library has, made known: found, folded, calibrated, fused, saved."""

import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adacomcat
from adacomcat import RankPlan, UserError, compress, find_sites
from adacomcat.cost import model_params, plan_params
from adacomcat.families import AttentionParts, Projection, ValueFoldedAttention
from adacomcat.layers import registry
from adacomcat.layers.linear import LowRankLinear


class HomeMade(nn.Module):
    """Softmax attention with names, a scale and a signature of its own."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.temperature = heads, 2.0
        self.query, self.key = (nn.Linear(width, 24, bias) for _ in range(2))
        self.value, self.output = nn.Linear(width, 24, bias), nn.Linear(24, width, bias)

    def project(self, tokens: Tensor) -> list[Tensor]:
        return [projection(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for projection in (self.query, self.key, self.value)]

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """padding: (B, N), true where nobody shall look."""
        q, k, v = self.project(tokens)
        logits = q @ k.mT / self.temperature
        if padding is not None:
            logits = logits.masked_fill(padding[:, None, None], -torch.inf)
        return self.output((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class HomeMadeCosine(HomeMade):
    """Queries and keys are normalised: the scores do not fold."""

    def project(self, tokens: Tensor) -> list[Tensor]:
        q, k, v = super().project(tokens)
        return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v]


class Encoder(nn.Module):
    """Two residual attentions; the second hides the last tokens from all."""

    def __init__(self, kind: type[HomeMade], bias: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 20, 4, 4)
        self.first, self.second = kind(20, 4, bias), kind(20, 4, bias)
        self.head = nn.Linear(20, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = x + self.first(x)
        padding = torch.arange(x.shape[1], device=x.device).expand(len(x), -1) > 9
        return self.head((x + self.second(x, padding=padding)).mean(1))


class Padded:
    """HomeMade's arguments."""

    def score_context(self, tokens: Tensor, padding: Tensor | None = None
                      ) -> tuple[Tensor | None, None]:
        return None if padding is None else ~padding[:, None, None], None


class LowRankHomeMade(Padded, adacomcat.LowRankAttention):
    pass


class LowRankHomeMadeCosine(Padded, ValueFoldedAttention):
    def queries_and_keys(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k = super().queries_and_keys(x, rope)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1)


def read(attn: HomeMade) -> AttentionParts:
    parts = (attn.query, attn.key, attn.value, attn.output)
    return AttentionParts(*map(Projection.of, parts), num_heads=attn.heads,
                          scale=1 / attn.temperature)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both classes are registered, for one test."""
    for kind in (nn.Linear, timm.layers.Attention):  # what is registered later would be forgotten
        registry.load_family(kind)
    monkeypatch.setattr(registry, "_attentions", dict(registry._attentions))
    adacomcat.register_attention(HomeMade, read, {"A": LowRankHomeMade})
    adacomcat.register_attention(HomeMadeCosine, read, {"B": LowRankHomeMadeCosine})


KINDS = pytest.mark.parametrize("kind", [HomeMade, HomeMadeCosine])
FOLDED = {HomeMade: ("qk", "vo"), HomeMadeCosine: ("q", "k", "vo")}


def encoder(kind: type[HomeMade], bias: bool = True) -> nn.Module:
    return Encoder(kind, bias).double().eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@KINDS
def test_an_unknown_class_has_only_its_linears(kind: type[HomeMade]) -> None:
    assert [site.name for site in find_sites(encoder(kind))][:4] == [
        "first.query", "first.key", "first.value", "first.output"]


@pytest.mark.usefixtures("known")
@KINDS
def test_a_registered_class_is_found(kind: type[HomeMade]) -> None:
    sites = find_sites(encoder(kind))
    assert [site.name for site in sites] == [
        *(f"{module}.{part}" for module in ("first", "second") for part in FOLDED[kind]), "head"]
    assert {(site.tier, site.num_heads, site.head_dim) for site in sites[:-1]} == {
        ("A" if kind is HomeMade else "B", 4, 6)}
    attention = sum(site.dense_params for site in sites if site.module == "first")
    assert attention == model_params(kind(20, 4))


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("calibrated", [True, False])
@KINDS
@torch.no_grad()
def test_full_rank_is_the_dense_model(kind: type[HomeMade], calibrated: bool, bias: bool) -> None:
    model, x = encoder(kind, bias), images(32)
    plan = RankPlan.full(model)
    compressed = compress(model, plan=plan, calibration=x if calibrated else None)
    assert type(compressed.first) is type(compressed.second) is (
        LowRankHomeMade if kind is HomeMade else LowRankHomeMadeCosine)
    assert relative(compressed(x), model(x)) < 1e-12
    assert model_params(compressed) == plan_params(model, plan)


@pytest.mark.usefixtures("known")
@torch.no_grad()
def test_calibration_sees_the_call_that_the_class_gets() -> None:
    """Hidden tokens are in nobody's average, so what is folded for the others is exact."""
    model, x = encoder(HomeMade), images(32)
    found = adacomcat.convert.calibrate.calibrate(model, x)["second"]
    tokens = model.patches(x).flatten(2).mT
    tokens = tokens + model.first(tokens)
    q, k, _ = model.second.project(tokens)
    averaged = (q @ k.mT / 2.0)[..., :10].softmax(-1) @ tokens[:, None, :10]
    torch.testing.assert_close(found.value_mean, averaged.mean((0, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("known")
@KINDS
@torch.no_grad()
def test_a_budget_a_plan_file_and_a_skeleton(kind: type[HomeMade], tmp_path) -> None:
    model, x = encoder(kind), images(32)
    compressed = compress(model, keep_params=0.7, calibration=x, multiple=2)
    assert model_params(compressed) <= 0.7 * model_params(model)
    compressed.rank_plan.save(tmp_path / "plan.json")
    plan = RankPlan.load(tmp_path / "plan.json")
    again = adacomcat.convert.build_skeleton(encoder(kind), plan)
    again.load_state_dict(compressed.state_dict())
    assert torch.equal(again(x), compressed(x))
    assert relative(adacomcat.optimize(compressed)(x), compressed(x)) < 1e-12


@pytest.mark.usefixtures("known")
@torch.no_grad()
def test_from_timm_folds_it_too() -> None:
    attn, x = HomeMade(20, 4).double(), torch.randn(3, 7, 20, dtype=torch.float64)
    folded = adacomcat.LowRankAttention.from_timm(attn)
    padding = torch.rand(3, 7) < 0.3
    assert relative(folded(x, padding), attn(x, padding)) < 1e-12
    with pytest.raises(UserError, match="does not fold whole"):
        adacomcat.LowRankAttention.from_timm(HomeMadeCosine(20, 4))


@pytest.mark.usefixtures("known")
def test_tiers_by_instance_and_by_model() -> None:
    asked = []

    def tier(attn: nn.Module, model: nn.Module | None) -> registry.Tier | None:
        asked.append(model)
        return "A" if attn.query.bias is not None else None

    adacomcat.register_attention(HomeMade, read, {"A": LowRankHomeMade}, tier)
    model = encoder(HomeMade)
    model.second = HomeMade(20, 4, bias=False).double()
    names = [site.name for site in find_sites(model)]
    assert names == ["first.qk", "first.vo", "second.query", "second.key", "second.value",
                     "second.output", "head"]
    assert asked == [model, model]


@pytest.mark.parametrize(("kind", "low_rank", "message"), [
    (HomeMade(20, 4), {"A": LowRankHomeMade}, "by its class"),
    (HomeMade, {"C": LowRankHomeMade}, "tier 'C'"),
    (HomeMade, {"A": LowRankLinear}, "subclass of adacomcat.LowRankAttention"),
    (HomeMade, {}, "0 tiers"),
    (HomeMade, {"A": LowRankHomeMade, "B": LowRankHomeMadeCosine}, "2 tiers"),
])
def test_bad_registrations_are_refused(kind: object, low_rank: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adacomcat.register_attention(kind, read, low_rank)


@pytest.mark.parametrize(("k", "out", "heads"), [(18, 24, 4), (24, 20, 4), (24, 24, 5)])
def test_projections_that_do_not_belong_together_are_refused(k: int, out: int, heads: int) -> None:
    q, v = (Projection(torch.zeros(24, 20)) for _ in range(2))
    with pytest.raises(UserError, match=re.escape("(24, 20)")):
        AttentionParts(q, Projection(torch.zeros(k, 20)), v, Projection(torch.zeros(20, out)),
                       heads, 1.0)


def test_only_families_and_drop_ins_name_a_library() -> None:
    """No other room imports a class of timm's layers or models."""
    root = Path(adacomcat.__file__).parent
    named = re.compile(r"^\s*(from|import) timm\.(layers|models\.(?!_hub))", re.MULTILINE)
    naming = {str(path.relative_to(root)) for path in root.rglob("*.py")
              if named.search(path.read_text())}
    assert {name for name in naming if name.split("/")[0] not in ("families", "layers")} <= {
        "search/supernet.py", "distill/start.py"}


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_a_rotary_embedding_is_found_inside_of_other_modules(name: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    def rotary() -> nn.Module:
        side = 28 if "14" in name else 32
        return timm.create_model(name, img_size=side, embed_dim=64, depth=2, num_heads=2,
                                 num_classes=3).eval()

    side = rotary().patch_embed.img_size[0]
    x = torch.randn(2, 3, side, side)
    for model in (rotary(), Wrapper(rotary()), nn.Sequential(rotary()),
                  nn.Sequential(Wrapper(rotary()), nn.Linear(3, 3))):
        kinds = {site.kind for site in find_sites(model) if ".attn." in site.name}
        assert kinds == {"q", "k", "vo"}
        small = compress(model, plan=RankPlan.full(model))
        with torch.no_grad():
            assert relative(small(x), model(x)) < 1e-4


def test_blocks_without_their_model_allow_a_rotary_embedding() -> None:
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, embed_dim=64, depth=2,
                              num_heads=2).eval()
    assert {site.tier for site in find_sites(nn.Sequential(*model.blocks))} <= {"B", "C"}
    plain = timm.create_model("eva_large_patch14_196", img_size=28, embed_dim=64, depth=2,
                              num_heads=2).eval()
    kinds = {site.kind for site in find_sites(nn.Sequential(plain)) if ".attn." in site.name}
    assert kinds == {"qk", "vo"}
