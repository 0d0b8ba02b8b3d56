"""bench/quality: every baseline against another route in float64, and the commands on tiny data."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from adacomcat.convert.calibrate import calibrate
from adacomcat.cost import model_macs, model_params
from adacomcat.data import datasets
from adacomcat.distill.config import TrainConfig
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench" / "quality"))

import baselines  # noqa: E402
import curve  # noqa: E402
import frequencies  # noqa: E402
import methods  # noqa: E402
import records  # noqa: E402
import run  # noqa: E402
import subjects  # noqa: E402

WIDTH, HEADS, IMAGES = 48, 2, 24
KEEP = 0.5
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
METRICS = {"plain": None, "asvd": baselines.asvd_metric, "svd_llm": baselines.svd_llm_metric,
           "afm": baselines.afm_metric}


def tiny_vit() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1,
                              embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=10).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double()


@pytest.fixture
def model() -> nn.Module:
    return tiny_vit()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(IMAGES, 1, 16, 16, dtype=torch.float64)


@torch.no_grad()
def rows(model: nn.Module, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(inputs, outputs) of one layer, (M, in) and (M, out), in one batch."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.extend([args[0], output]))
    model(images)
    hook.remove()
    return seen[0].flatten(0, -2), seen[1].flatten(0, -2)


def cut(model: nn.Module, images: Tensor, metric: str, keep: float = KEEP) -> nn.Module:
    return baselines.cut_matrices(model, keep, METRICS[metric],
                                  baselines.collect_inputs(model, images))


def truncated_svd(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


LAYERS = ("blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2")


def test_inputs_are_the_moments_of_all_tokens(model: nn.Module, images: Tensor) -> None:
    found = baselines.collect_inputs(model, images)
    assert set(LAYERS) < set(found) and len(found) == 8, "all but the classifier"
    for name in LAYERS:
        x, _ = rows(model, images, name)
        torch.testing.assert_close(found[name].mean, x.mean(0), **TIGHT)
        torch.testing.assert_close(found[name].covariance, torch.cov(x.T, correction=0), **TIGHT)
        torch.testing.assert_close(found[name].magnitude, x.abs().mean(0), **TIGHT)


@pytest.mark.parametrize("name", LAYERS)
def test_asvd_is_the_svd_of_scaled_columns(model: nn.Module, images: Tensor, name: str) -> None:
    made = cut(model, images, "asvd").get_submodule(name)
    linear, (x, _) = model.get_submodule(name), rows(model, images, name)
    scale = x.abs().mean(0).sqrt().numpy()
    weight = truncated_svd(linear.weight.detach().numpy() * scale, made.rank) / scale
    torch.testing.assert_close(made.weight.detach(), torch.tensor(weight), **TIGHT)
    torch.testing.assert_close(made.bias, linear.bias, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_whitened_loss_is_the_tail_of_the_whitened_spectrum(model: nn.Module, images: Tensor,
                                                            name: str) -> None:
    made = cut(model, images, "svd_llm").get_submodule(name)
    linear, (x, y) = model.get_submodule(name), rows(model, images, name)
    loss = (y - made(x)).square().sum(1).mean().item()
    spectrum = np.linalg.svd((y - linear.bias).detach().numpy(), compute_uv=False)
    assert loss == pytest.approx(np.square(spectrum[made.rank:]).sum() / len(x), rel=1e-8)


@pytest.mark.parametrize("name", LAYERS)
def test_afm_on_calibration_is_the_pca_of_the_outputs(model: nn.Module, images: Tensor,
                                                      name: str) -> None:
    made = cut(model, images, "afm").get_submodule(name)
    x, y = rows(model, images, name)
    centred = (y - y.mean(0)).numpy()
    reconstruction = y.mean(0) + torch.tensor(truncated_svd(centred, made.rank))
    # Covariances of normalised tokens are singular, and floored at 1e-6 of their mean.
    torch.testing.assert_close(made(x).detach(), reconstruction, rtol=1e-5, atol=1e-5)
    tail = np.square(np.linalg.svd(centred, compute_uv=False)[made.rank:]).sum()
    assert (y - made(x)).square().sum().item() == pytest.approx(tail, rel=1e-8)


@pytest.mark.parametrize("name", LAYERS)
def test_plain_is_the_svd(model: nn.Module, images: Tensor, name: str) -> None:
    made = cut(model, images, "plain").get_submodule(name)
    weight = truncated_svd(model.get_submodule(name).weight.detach().numpy(), made.rank)
    torch.testing.assert_close(made.weight.detach(), torch.tensor(weight), **TIGHT)


@torch.no_grad()
def test_products_without_biases_are_those_of_the_dense_matrices(model: nn.Module) -> None:
    made = baselines.cut_products(model, KEEP, biases=False).blocks[0].attn
    assert not made.bq.any() and not made.bo.any()
    q, k, v = (part.unflatten(0, (HEADS, -1)).numpy()
               for part in model.blocks[0].attn.qkv.weight.chunk(3))
    out = model.blocks[0].attn.proj.weight.unflatten(1, (HEADS, -1)).transpose(0, 1).numpy()
    made_q, made_k, made_v = (part.unflatten(0, (HEADS, -1)).numpy()
                              for part in (made.wq, made.wk, made.wv))
    made_out = made.wo.unflatten(1, (HEADS, -1)).transpose(0, 1).numpy()
    for head in range(HEADS):
        np.testing.assert_allclose(made_q[head].T @ made_k[head],
                                   truncated_svd(q[head].T @ k[head], made.rank_qk), atol=1e-9)
        np.testing.assert_allclose(made_out[head] @ made_v[head],
                                   truncated_svd(out[head] @ v[head], made.rank_vo), atol=1e-9)


@torch.no_grad()
def test_whitened_products_beat_plain_ones_on_their_own_images(model: nn.Module, images: Tensor
                                                               ) -> None:
    """In the mean squared error of one attention's value path, whose tail both minimise."""
    attn = model.blocks[0].attn
    x = model.blocks[0].norm1(model._pos_embed(model.patch_embed(images)))
    q, k, _ = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in attn.qkv(x).chunk(3, -1))
    averaged = (q @ k.mT * attn.scale).softmax(-1) @ x.unsqueeze(1)  # (B, H, N, d)

    def value_error(made: nn.Module) -> float:
        new = made.blocks[0].attn
        values = torch.einsum("bhnd,hrd->bnhr", averaged, new.wv.unflatten(0, (HEADS, -1)))
        return (attn(x) - values.flatten(2) @ new.wo.T - new.bo).square().mean().item()

    whitened = baselines.cut_products(model, KEEP, calibrate(model, images))
    assert value_error(whitened) < 0.9 * value_error(baselines.cut_products(model, KEEP))


@torch.no_grad()
@pytest.mark.parametrize("make", [baselines.matrix_sites, baselines.joint_sites])
def test_at_full_rank_nothing_is_lost(model: nn.Module, images: Tensor, make,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "uniform_plan", lambda model, sites, keep: RankPlan(
        {site.name: site.full_rank for site in sites}))
    if make is baselines.matrix_sites:
        made = [cut(model, images, metric) for metric in METRICS]
    else:
        made = [baselines.cut_products(model, KEEP),
                baselines.cut_products(model, KEEP, calibrate(model, images))]
    for network in made:
        torch.testing.assert_close(network(images), model(images), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [baselines.matrix_sites, baselines.joint_sites])
@pytest.mark.parametrize("keep", [0.75, 0.5, 0.3])
def test_ranks_are_uniform_and_use_the_budget(model: nn.Module, make, keep: float) -> None:
    sites = make(model)
    plan = baselines.uniform_plan(model, sites, keep)
    whole = model_params(model)
    fixed = whole - sum(site.dense_params for site in sites)
    shares = [plan[site.name] / site.break_even for site in sites]
    steps = [1 / site.break_even for site in sites]
    assert max(shares) - min(shares) < max(steps)
    assert fixed + plan.params(sites) <= keep * whole
    # One step more: that of all sites whose rank is the next to rise.
    following = {site.name: (plan[site.name] + 1) / site.break_even for site in sites}
    least = min(following.values())
    larger = RankPlan({name: rank + (following[name] == least)
                       for name, rank in plan.ranks.items()})
    assert fixed + larger.params(sites) > keep * whole


def test_a_keep_below_rank_one_is_refused(model: nn.Module) -> None:
    with pytest.raises(UserError, match="keep more"):
        baselines.uniform_plan(model, baselines.matrix_sites(model), 0.01)


def test_macs_are_counted_whatever_the_modules(model: nn.Module, images: Tensor) -> None:
    model, images = model.float(), images.float()
    assert run.count_macs(model) == model_macs(model)
    folded = baselines.cut_products(model, KEEP)
    assert run.count_macs(folded) == model_macs(folded)
    apart = cut(model, images, "svd_llm")
    tokens = model.pos_embed.shape[1]
    weights = sum(module.v.numel() + module.u.numel() for module in apart.modules()
                  if hasattr(module, "rank"))
    attended = 2 * 2 * WIDTH * tokens**2  # two blocks, logits and averages
    assert run.count_macs(apart) == (model.patch_embed.proj.weight.numel() * (tokens - 1)
                                     + tokens * weights + attended + WIDTH * 10)


def digits_subject(args: Any = None, seed: int = 0) -> methods.Subject:
    """What fashion_mnist returns, on bundled images and in seconds."""
    torch.manual_seed(seed)
    model = tiny_vit().float()
    train_set, test_set = datasets.train_and_test("digits", None, datasets.model_data_config(model))
    subject = subjects.classifier(
        model, train_set.subset(torch.arange(300)), test_set.subset(torch.arange(100)),
        TrainConfig(epochs=1 if args is None else args.epochs, batch_size=64,
                    calibration_images=64, seed=seed))
    subject.training["search_steps"] = 2
    return subject


def test_all_methods_side_by_side() -> None:
    subject = digits_subject()
    found = run.compare_methods(subject, methods.methods_for(subject), KEEP, repeats=1)
    quick = [name for name, method in methods.METHODS.items() if not method.named]
    assert list(found) == ["dense", *quick] and len(quick) + 1 == len(methods.METHODS)
    whole, macs = (found["dense"][name] for name in ("params", "macs"))
    for name, record in found.items():
        assert set(record) == {"params", "macs", "latency_ms", "top1", "seconds"}, name
        assert min(record["latency_ms"], record["seconds"]) > 0 or name == "dense", name
        if name != "dense":
            bound = whole if "ComCAT's search" in name else KEEP * whole  # theirs has no budget
            assert 0.9 * KEEP * whole < record["params"] <= bound and record["macs"] < macs, name


def test_statistics_are_made_once_and_their_seconds_count_for_every_keep() -> None:
    made = []

    def collect(model: nn.Module, images: Tensor) -> int:
        made.append(len(images))
        time.sleep(0.2)
        return 5

    method = methods.Method(lambda subject, keep, found: nn.Linear(found, int(10 * keep)), collect)
    subject = digits_subject()
    for keep in (0.4, 0.8):
        model, seconds = methods.compressed(method, subject, keep)
        assert model.weight.shape == (10 * keep, 5)
        assert seconds >= 0.2
    assert made == [64]


def test_methods_that_train_need_labels() -> None:
    subject = digits_subject()
    subject.train_set = None
    found = methods.methods_for(subject)
    assert "ours, training-free" in found
    assert not {"ours, searched", "ComCAT's search", "Adaptive-ComCAT's search"} & set(found)
    slow = "ours + 15 minutes of recovery"
    assert slow not in found and slow in methods.methods_for(subject, [slow])
    assert list(methods.methods_for(subject, ["AFM", "ASVD"])) == ["AFM", "ASVD"]
    with pytest.raises(UserError, match="'ours, searched' trains on labels"):
        methods.methods_for(subject, ["AFM", "ours, searched"])


def test_finished_runs_are_kept(tmp_path: Path) -> None:
    path, calls = tmp_path / "new" / "runs.json", []

    def make() -> dict[str, int]:
        calls.append(1)
        return {"n": len(calls)}

    assert records.Records(path).get("a", make) == {"n": 1}
    again = records.Records(path)
    assert again.get("a", make) == {"n": 1} and again.get("b", make) == {"n": 2}
    assert [file.name for file in path.parent.iterdir()] == ["runs.json"]
    path.write_text("{")
    with pytest.raises(UserError, match="move that file away"):
        records.Records(path)


def called(monkeypatch: pytest.MonkeyPatch, script: Any, *flags: str) -> None:
    monkeypatch.setattr(script, "fashion_mnist", digits_subject)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
    script.main()


@pytest.mark.parametrize("flags, named", [
    (["--keeps", "1.5"], "1.5"), (["--crops", "0"], "--crops"), (["--methods", "SVD"], "SVD")])
def test_wrong_use_is_one_line_and_exit_code_2(
        flags: list[str], named: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    with pytest.raises(SystemExit) as stop:
        records.command(run.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("run: error:") and named in said and said.count("\n") == 1


def test_a_curve_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--keeps", "0.6", "0.4", "--seeds", "0", "1", "--epochs", "1", "--output",
             str(tmp_path), "--methods", "ours, training-free", "plain SVD, exact biases")
    run_once, count = curve.run_once, []

    def stopping(*args: Any) -> records.Record:
        count.append(args)
        if len(count) == 6:
            raise KeyboardInterrupt
        return run_once(*args)

    monkeypatch.setattr(curve, "run_once", stopping)
    with pytest.raises(KeyboardInterrupt):
        called(monkeypatch, curve, *flags)
    assert not (tmp_path / "curve.md").exists()
    called(monkeypatch, curve, *flags)
    assert len(count) == 6 + 3, "five of eight were kept"
    lines = (tmp_path / "curve.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| 0.")]
    assert [line.split(" | ")[0] for line in table] == ["| 0.6", "| 0.4"]
    assert all(line.count("±") == 2 for line in table)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_parameters_at_an_accuracy() -> None:
    line = [curve.Point(100, [80.0]), curve.Point(10000, [89.0, 91.0]), curve.Point(10, [60.0])]
    assert curve.params_at(line, 85.0) == pytest.approx(1000)
    assert curve.params_at(line, 60.0) == pytest.approx(10)
    assert curve.params_at(line, 59.0) is curve.params_at(line, 91.0) is None
    worse = [curve.Point(4000, [85.0]), curve.Point(40, [50.0])]
    assert curve.saved({"a": line, "b": worse}, "a", "b") == ["75 %", "–"]


def test_frequencies_search_as_often_as_their_policies_say(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called(monkeypatch, frequencies, "--epochs", "3", "--seeds", "0", "--keep", "0.5",
           "--output", str(tmp_path))
    found = {key.partition(",")[0]: record
             for key, record in records.Records(tmp_path / "frequencies.json").found.items()}
    assert set(found) == set(frequencies.POLICIES)
    assert found["every"]["epochs"] == [1, 2, 3]
    for record in found.values():
        assert record["search_count"] == len(record["epochs"])
        assert 0 < record["search_seconds"] < record["seconds"]
    cells = [line.split(" | ") for line in (tmp_path / "frequencies.md").read_text().splitlines()
             if line.startswith("| every") or line.startswith("| doubling")]
    assert cells[0][1] == "3.0" and cells[0][3] == "100 %"
    assert cells[1][0] == "| doubling"


def test_photographs_are_chosen_evenly() -> None:
    import photos  # found by bench/quality/paths.py

    files = [Path(f"{index:02d}.jpg") for index in range(10)]
    assert photos.spread(files, 4) == [files[0], files[2], files[5], files[7]]
    assert photos.spread(files, 99) == files
    calibration, test = photos.split([], others=False)
    everything, same = photos.split([])
    assert same == test and set(calibration) < set(everything)
    assert "moon.png" in {path.name for path in set(everything) - set(calibration)}


def test_error_of_tokens_is_relative_to_their_spread() -> None:
    import fidelity

    dense = torch.randn(3, 5, 7)
    assert fidelity.compare(dense, dense) == pytest.approx((0.0, 1.0), abs=1e-6)
    mean = dense.mean((0, 1)).expand_as(dense)
    assert fidelity.compare(dense, mean)[0] == pytest.approx(1.0)
    assert fidelity.compare(dense, dense + 2 * (mean - dense))[0] == pytest.approx(4.0)


def test_every_photograph_tests_in_one_split() -> None:
    import photos

    tested = [photos.split([], first=first)[1] for first in range(photos.TEST_EVERY)]
    calibration, _ = photos.split([], others=False)
    assert sorted(sum(tested, [])) == sorted(calibration + tested[0])
    assert sum(map(len, tested)) == len(set().union(*tested))


def test_recovery_sees_flipped_images_and_new_collages() -> None:
    images = torch.rand(6, 3, 16, 16)
    batches = [next(iter(made)) for made in [methods.RecoveryBatches(images, 8)] * 3]
    again = next(iter(methods.RecoveryBatches(images, 8)))
    assert torch.equal(batches[0], again) and not torch.equal(batches[0], batches[1])
    known = torch.cat([images, images.flip(-1)])
    is_known = [[any(torch.equal(image, one) for one in known) for image in batch]
                for batch in batches]
    assert all(found[:4] == [True] * 4 and not any(found[4:]) for found in is_known)
