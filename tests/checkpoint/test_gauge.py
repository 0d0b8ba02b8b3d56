"""Files that leave r² numbers of each factorisation out: the same map, from fewer numbers."""

import pytest
import timm
import torch
from helpers.models import FAMILIES, compressed, dense_model, images
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import adacomcat
from adacomcat.checkpoint.folder import WEIGHTS
from adacomcat.checkpoint.gauge import PIVOTS, with_gauge, without_gauge
from adacomcat.errors import UserError
from adacomcat.factorize.interpolative import pivot_rows
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear


def layer(k, n, r, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    linear = LowRankLinear(k, n, r, dtype=dtype)
    with torch.no_grad():  # columns of very different lengths, as singular vectors have
        linear.v *= torch.logspace(0, -3, r) if r else 1.0
    return linear


def restored(linear):
    stripped = without_gauge(linear, linear.state_dict())
    return stripped, with_gauge(stripped)


def map_of(weights):
    return weights["u"].double() @ weights["v"].double().T


def error(found, expected):
    return (torch.linalg.norm(found - expected) / torch.linalg.norm(expected)).item()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(0, 40), seed=st.integers(0, 99))
def test_the_map_stays_and_r_squared_numbers_go(k, n, r, seed):
    linear = layer(k, n, r, seed=seed)
    before = linear.state_dict()
    stripped, after = restored(linear)
    assert {name: t.shape for name, t in after.items()} == {
        name: t.shape for name, t in before.items()}
    torch.testing.assert_close(map_of(after), map_of(before), rtol=1e-4, atol=1e-5)
    numbers = sum(t.numel() for name, t in stripped.items() if not name.endswith(PIVOTS))
    saved = r * r if 0 < r <= k else 0
    assert numbers == sum(t.numel() for t in before.values()) - saved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_more_is_rounded_than_factors_are(dtype):
    """Against the float64 product of exact factors: what rounding them to ``dtype`` costs, twice.
    """
    exact = layer(96, 64, 24, torch.float64)
    rounded = layer(96, 64, 24, torch.float64).to(dtype)
    _, after = restored(rounded)
    expected = map_of(exact.state_dict())
    assert error(map_of(after), expected) <= 2 * error(map_of(rounded.state_dict()), expected)


def test_factors_without_full_rank_are_kept():
    linear = layer(30, 20, 8)
    with torch.no_grad():
        linear.v[:, 5:] = 0
        linear.v[:, 1] = linear.v[:, 0]
    _, after = restored(linear)
    assert error(map_of(after), map_of(linear.state_dict())) < 1e-5


def test_what_is_not_finite_is_written_as_it_is():
    linear = layer(30, 20, 8)
    with torch.no_grad():
        linear.v[3, 2] = torch.nan
    stripped, _ = restored(linear)
    assert "v" in stripped and torch.equal(stripped["v"].isnan(), linear.v.isnan())


@pytest.mark.parametrize("seed", range(5))
def test_pivots_keep_the_other_rows_small(seed):
    """Pivots of random subspaces stay small; the bound of Gaussian elimination would be 2^r."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(3, 200, 40, dtype=torch.float64)).Q
    pivots = pivot_rows(basis)
    assert (pivots.diff() > 0).all()
    chosen = basis.gather(1, pivots[..., None].expand(-1, -1, 40))
    assert torch.linalg.solve(chosen, basis, left=False).abs().max() < 10


@pytest.mark.parametrize("architecture", FAMILIES)
def test_saved_without_and_loaded_by_us_and_by_timm(architecture, tmp_path):
    model = compressed(architecture)
    adacomcat.save(model, tmp_path / "plain")
    adacomcat.save(model, tmp_path / "gauge", gauge=True)
    x = images(model)
    by_timm = timm.create_model(f"local-dir:{tmp_path}/gauge", pretrained=True).eval()
    with torch.inference_mode():
        expected = model(x)
        for again in (adacomcat.load(tmp_path / "gauge"), by_timm):
            torch.testing.assert_close(again(x), expected, rtol=1e-3, atol=1e-4)
    plain, gauge = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "gauge"))
    assert numbers_of(plain) - numbers_of(gauge) == redundant(model) > 0


def numbers_of(weights):
    return sum(t.numel() for name, t in weights.items() if not name.endswith(PIVOTS))


def redundant(model):
    total = 0
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            total += module.rank**2
        elif isinstance(module, LowRankAttention):
            total += module.num_heads * module.rank_vo**2
            total += module.num_heads * module.rank_qk**2 if hasattr(module, "wk") else 0
    return total


def test_a_loaded_model_is_saved_again(tmp_path):
    model = compressed()
    adacomcat.save(model, tmp_path / "one", gauge=True)
    again = adacomcat.load(tmp_path / "one")
    adacomcat.save(again, tmp_path / "two", gauge=True)
    x = images(model)
    with torch.inference_mode():
        torch.testing.assert_close(adacomcat.load(tmp_path / "two")(x), model(x),
                                   rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damage, message", [
    (lambda pivots, rest: pivots.fill_(10**6), "do not belong together"),
    (lambda pivots, rest: pivots.fill_(int(pivots.flatten()[0])), "row twice"),
    (lambda pivots, rest: rest.resize_(rest.shape[0], rest.shape[1] - 1), "do not belong together"),
])
def test_a_damaged_file_is_refused(damage, message, tmp_path):
    adacomcat.save(compressed(), tmp_path / "one", gauge=True)
    path = tmp_path / "one" / WEIGHTS
    weights = load_file(path)
    name = next(name for name in weights if name.endswith(f"fc1.v{PIVOTS}"))
    damage(weights[name], weights[name.replace(PIVOTS, "_rest")])
    save_file(weights, path)
    with pytest.raises(UserError, match=message):
        adacomcat.load(tmp_path / "one", verify=False)


def test_a_file_that_lacks_the_rest_is_refused(tmp_path):
    adacomcat.save(compressed(), tmp_path / "one", gauge=True)
    path = tmp_path / "one" / WEIGHTS
    weights = load_file(path)
    del weights[next(name for name in weights if name.endswith("_rest"))]
    save_file(weights, path)
    with pytest.raises(UserError, match="missing: .*unexpected: "):
        adacomcat.load(tmp_path / "one", verify=False)


def test_the_command_line_has_it(tmp_path, run_json):
    adacomcat.save(dense_model(), tmp_path / "dense")
    sizes = {}
    for name, flags in (("plain", ()), ("smaller", ("--gauge",))):
        run_json("compress", "-m", tmp_path / "dense", "--keep-params", 0.6, "--no-report",
                 "--output", tmp_path / name, *flags)
        sizes[name] = numbers_of(load_file(tmp_path / name / WEIGHTS))
    assert sizes["plain"] - sizes["smaller"] == redundant(adacomcat.load(tmp_path / "smaller"))
