"""timm's architectures through every step, as ``tools/zoo.py`` tries them; what they taught us."""

import pytest
import timm
import torch
import zoo
import zoo_trials
from helpers.tolerance import relative_error
from timm.layers import Linear, Mlp
from torch import Tensor, nn

import adacomcat
from adacomcat import RankPlan, compress, find_sites
from adacomcat.sites import altered_layers
from adacomcat.utils.model import input_size


def test_an_architecture_passes_every_step():
    trial = zoo_trials.tried("test_vit", "vision_transformer")
    assert trial.good and all(0.5 < kept <= 0.6 for kept in trial.kept.values())


def test_an_architecture_that_cannot_shrink_says_so():
    trial = zoo_trials.tried("test_resnet", "resnet")
    assert trial.good and all("below what is reachable" in said for said in trial.kept.values())


def test_a_trial_tells_of_a_crash():
    trial = zoo_trials.tried("no_such_architecture", "resnet")
    assert not trial.good and "Unknown model" in trial.error
    assert "Unknown model" in zoo.entry("no_such_architecture", "resnet").error


def test_a_census_needs_no_memory_for_weights():
    assert all(p.is_meta for p in zoo.outline("vit_giant_patch14_224").parameters())


@pytest.mark.parametrize(("name", "arguments"), [
    ("levit_128s", {"img_size": 256}), ("gcvit_xxtiny", {"img_size": 448}),
    ("gmixer_12_224", {"img_size": (96, 64)}), ("coat_tiny", {"img_size": 288, "in_chans": 1}),
    ("csatv2", {})])  # whose first convolution sees frequencies
@torch.no_grad()
def test_images_have_the_size_that_a_model_was_built_for(name, arguments):
    model = zoo.outline(name, **arguments)
    size = arguments.get("img_size", 512)
    expected = (size, size) if isinstance(size, int) else size
    assert input_size(model) == (arguments.get("in_chans", 3), *expected)
    assert model(torch.empty(1, *input_size(model), device="meta")).shape == (1, 1000)


@torch.no_grad()
def test_a_model_of_another_size_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    dense = timm.create_model("test_coatnet", img_size=96).eval()
    small, x = compress(dense, keep_params=0.9), torch.randn(2, 3, 96, 96)
    adacomcat.save(small, tmp_path / "small")
    assert torch.equal(adacomcat.load(tmp_path / "small")(x), small(x))


class Parallel(nn.Module):
    """One MLP under two names, as in CoaT's parallel blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = Mlp(16, 64, 16)
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.head(x + self.second(x))


@torch.no_grad()
def test_a_module_with_two_names_is_replaced_under_both():
    dense, x = Parallel().eval(), torch.randn(200, 9, 16)
    small = compress(dense, keep_params=0.6, calibration=x, multiple=2)
    assert small.first is small.second and type(small.first) is not type(dense.head)
    assert "first.hidden" in small.rank_plan.ranks
    assert sum(p.numel() for p in small.parameters()) <= 0.6 * sum(
        p.numel() for p in dense.parameters())
    again = adacomcat.convert.build_skeleton(Parallel().eval(), small.rank_plan)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))
    plain = adacomcat.to_plain(compress(dense, keep_params=0.6))
    assert plain.first is plain.second
    assert "LowRankLinear" not in {type(module).__name__ for module in plain.modules()}


@torch.no_grad()
def test_linear_layers_of_timm_shrink():
    assert "classifier" in {site.name for site in find_sites(zoo.outline("mobilenetv3_small_050"))}
    dense, x = nn.Sequential(Linear(12, 9)).double(), torch.randn(5, 12, dtype=torch.float64)
    assert relative_error(compress(dense, plan=RankPlan.full(dense))(x), dense(x)) < 1e-12


def test_altered_linear_layers_of_timm_are_named():
    model = timm.create_model("test_byobnet").eval()
    model.head.fc = Linear(model.head.fc.in_features, 3)
    model.head.fc.register_forward_hook(lambda module, args, output: output * 2)
    assert altered_layers(model) == ["head.fc"]
