"""ComCAT's published search, against what its code computes with numpy."""

import copy
import math
import signal

import numpy as np
import pytest
import timm
import torch
from helpers.runs import make_model, make_sets
from torch import Tensor

from adacomcat import find_sites, train
from adacomcat.convert.factors import factorize_model
from adacomcat.distill.config import TrainConfig
from adacomcat.search import RankGates, build_supernet, policy
from adacomcat.search.published import decompose_anew_, drop_attention_biases_, menu
from adacomcat.search.supernet import set_ranks_

ATTENTION = {192: [32, 64, 96, 128, 160], 384: [64, 128, 192, 256, 320],
             768: [128, 192, 256, 320, 384, 448, 512]}
LINEAR = {192: [6, 12, 24, 48, 64, 96, 128, 144],
          384: [12, 24, 32, 48, 64, 96, 128, 144, 192, 288],
          768: [24, 32, 48, 64, 128, 192, 256, 320, 384, 448, 512]}


@pytest.mark.parametrize(("name", "width", "heads"), [
    ("deit_tiny_patch16_224", 192, 3), ("deit_small_patch16_224", 384, 6),
    ("deit_base_patch16_224", 768, 12)])
def test_menus_are_those_of_the_code(name, width, heads):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    for site in find_sites(model):
        expected = LINEAR[width]
        if site.folded:
            expected = [total // heads for total in ATTENTION[width]]
        assert list(menu(site)) == expected, site.name


def test_menus_of_other_widths_are_shares():
    for site in find_sites(timm.create_model("vit_tiny_patch16_224", embed_dim=96, depth=1,
                                             num_heads=2, num_classes=10)):
        ranks = menu(site)
        assert ranks == tuple(sorted(set(ranks))) and 1 <= ranks[0] <= ranks[-1] <= site.full_rank
        if site.kind == "linear" and site.name != "head":
            assert ranks == (3, 6, 8, 12, 16, 24, 32, 36, 48, 72)


def make_supernet():
    torch.manual_seed(3)
    model = make_model()
    sites = find_sites(model)
    drop_attention_biases_(model, sites)
    supernet = build_supernet(model, factorize_model(model, sites=sites), sites)
    gates = RankGates(sites, menu=menu)
    torch.nn.init.normal_(gates.logits)
    set_ranks_(supernet, gates.likeliest())
    return supernet.eval(), gates.likeliest()


def products(supernet) -> dict[str, tuple[Tensor, Tensor]]:
    """Name → (first factor (m, r), second factor (r, n)) as ComCAT multiplies them."""
    found = {}
    for name, module in supernet.named_modules():
        if hasattr(module, "active_vo"):
            full, heads = module.full, module.full.num_heads
            for head in range(heads):
                def rows(matrix, rank, head=head, heads=heads):
                    return matrix.view(heads, -1, matrix.shape[-1])[head][:rank]
                qk, vo = module.active_qk, module.active_vo
                found[f"{name}.qk{head}"] = rows(full.wq, qk).T, rows(full.wk, qk)
                found[f"{name}.vo{head}"] = rows(full.wv, vo).T, rows(full.wo.T, vo)
        elif hasattr(module, "active"):
            rank = module.active
            found[name] = module.v[:, :rank], module.u[:, :rank].T
    return {name: tuple(part.detach().double() for part in pair) for name, pair in found.items()}


def test_factors_are_decomposed_again_as_by_numpy():
    supernet, _ = make_supernet()
    image = torch.randn(2, 1, 16, 16)
    before, outputs = products(supernet), supernet(image)
    decompose_anew_(supernet)
    torch.testing.assert_close(supernet(image), outputs, rtol=1e-4, atol=1e-5)
    after = products(supernet)
    assert before.keys() == after.keys() and len(before) > 8
    for name, (first, second) in before.items():
        u, s, v = np.linalg.svd((first @ second).numpy(), full_matrices=False)
        rank, (left, right) = first.shape[1], after[name]
        np.testing.assert_allclose(left.T @ left, np.eye(rank), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(right, axis=1), s[:rank], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(left @ right, u[:, :rank] * s[:rank] @ v[:rank], atol=1e-5)


def test_what_was_cut_does_not_come_back_with_its_weights():
    supernet, plan = make_supernet()
    image = torch.randn(2, 1, 16, 16)
    outputs = supernet(image)
    full = {site: None for site in plan.ranks}
    decompose_anew_(supernet)
    set_ranks_(supernet, type(plan)({name: "dense" for name in full}))
    torch.testing.assert_close(supernet(image), outputs, rtol=1e-4, atol=1e-5)
    for module in supernet.modules():  # but what comes back can learn: its first factor is whole
        if hasattr(module, "active"):
            assert (module.v.norm(dim=0) > 0.99).all()


def run(**changes):
    model = make_model()
    config = TrainConfig.preset("comcat", **{
        "epochs": 4, "batch_size": 64, "keep_params": 0.5, "threads": 1, "device": "cpu",
        "steps": 2, **changes})
    with pytest.warns(UserWarning, match="searched on the images that judge"):
        return train.run(model, config, *make_sets(model))


def test_a_run_searches_and_anneals_as_published():
    result = run()
    searches = result.results["searches"]
    assert [found["epoch"] for found in searches] == [2, 3, 4]
    rate = (0.1 / 5) ** (1 / 4)
    assert [found["temperature"] for found in searches] == pytest.approx(
        [5.0, 5.0 * rate, 5.0 * rate ** 2])
    sites = {site.name: site for site in find_sites(make_model())}
    for found in searches:
        assert all(rank in menu(sites[name]) for name, rank in found["ranks"].items())


def test_adaptive_comcat_doubles_from_the_second_epoch_on(monkeypatch):
    class Same(policy.Doubling):
        def record(self, epoch, ranks):
            super().record(epoch, [1])

    monkeypatch.setitem(policy.POLICIES, "adaptive", Same)
    found = run(search="adaptive", epochs=9)
    # its epochs 1, 2, 4 and 8, counted from 0
    assert [search["epoch"] for search in found.results["searches"]] == [2, 3, 5, 9]


def test_training_starts_at_the_largest_ranks_and_argmax_knows_no_budget():
    found = run(epochs=1, keep_params=0.2)  # its only epoch comes before any search
    sites = {site.name: site for site in find_sites(make_model())}
    assert found.results["plan"] == {name: menu(site)[-1] for name, site in sites.items()}
    assert found.results["keep"] > 0.2


def test_the_search_sees_the_validation_images_once_in_their_order(monkeypatch):
    seen = []
    monkeypatch.setattr("adacomcat.search.search.RankSearch.step",
                        lambda self, images, labels, *rest: seen.append(labels) or 0.0)
    run(epochs=2, search_batch_size=32)
    _, test_set = make_sets(make_model())
    assert torch.equal(torch.cat(seen), test_set.labels) and len(seen[0]) == 32


def test_held_out_images_by_flag():
    model = make_model()
    config = TrainConfig.preset("comcat", epochs=2, batch_size=64, keep_params=0.5, threads=1,
                                device="cpu", search_images="held-out", steps=1)
    assert train.run(model, config, make_sets(model)[0]).results["searches"]
    with pytest.raises(train.UserError, match="see validation images, and there are none"):
        train.run(model, config.with_(search_images="validation"), make_sets(model)[0])


def test_the_optimiser_forgets_after_a_search(monkeypatch):
    made = []
    from adacomcat.distill import trainer
    real = trainer.create_optimizer_v2
    monkeypatch.setattr(trainer, "create_optimizer_v2",
                        lambda *args, **kwargs: made.append(kwargs) or real(*args, **kwargs))
    run()
    assert len(made) == 1 + 3
    assert made[0]["lr"] == pytest.approx(5e-4 * 64 / 512)
    made.clear()
    run(lr_base=0, epochs=1)
    assert made[0]["lr"] == 5e-4


def test_the_rate_stays_within_an_epoch():
    history = run().results["history"]
    highest = 5e-4 * 64 / 512  # the code's rate is for 512 images
    expected = [1e-5 + (highest - 1e-5) * (1 + math.cos(math.pi * epoch / 4)) / 2
                for epoch in range(4)]
    assert [found["lr"] for found in history] == pytest.approx(expected)


@pytest.mark.parametrize("finetuned", [True, False])
def test_attention_biases_train_once_the_ranks_stand(finetuned):
    def biases(epochs):
        found = run(epochs=2, finetune_epochs=epochs, finetune_attention_biases=finetuned)
        return torch.cat([torch.cat([block.attn.bq, block.attn.bo])
                          for block in found.model.blocks])

    assert biases(0).abs().max() == 0
    assert (biases(1).abs().max() > 0) == finetuned


@pytest.mark.parametrize("trained", [True, False])
def test_the_second_stage_trains_biases_or_leaves_them_out(trained):
    """As the second command does with --attn2-with-bias, or without."""
    small = run(epochs=1).model
    config = TrainConfig.preset("comcat", epochs=1, steps=2, batch_size=64, threads=1, device="cpu",
                                finetune_attention_biases=trained)
    found = train.run(small, config, *make_sets(small), teacher=make_model()).model
    biases = torch.cat([torch.cat([block.attn.bq, block.attn.bo]) for block in found.blocks])
    assert (biases.abs().max() > 0) == trained


def test_a_resumed_run_is_the_same(tmp_path):
    """The factors are made anew at a search and not again after it, and so are the biases."""
    whole = run(epochs=2, finetune_epochs=1)
    model = make_model()
    config = TrainConfig.preset("comcat", epochs=2, finetune_epochs=1, batch_size=64,
                                keep_params=0.5, threads=1, device="cpu", steps=2,
                                state_dir=str(tmp_path / "state"))
    for stops in ("search", "finetuning"):
        assert interrupted(config, stops)
        config = config.with_(resume=True)
    with pytest.warns(UserWarning):
        again = train.run(model, config, *make_sets(model))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_a_run_that_searches_other_validation_images_is_refused(tmp_path):
    model = make_model()
    config = TrainConfig.preset("comcat", epochs=2, batch_size=64, keep_params=0.5, threads=1,
                                device="cpu", steps=2, state_dir=str(tmp_path / "state"))
    assert interrupted(config, "search")
    train_set, test_set = make_sets(model)
    with pytest.warns(UserWarning), \
            pytest.raises(train.UserError, match="began with another validation set"):
        train.run(model, config.with_(resume=True), train_set, test_set.subset(torch.arange(50)))


def interrupted(config, when):
    """Whether a run ended by a signal in the midst of a search, or of the last epoch."""
    from adacomcat.distill import trainer
    model, patch = make_model(), pytest.MonkeyPatch()

    def asked(self=None):
        return signal.SIGTERM if reached() else None

    running = []
    real = trainer.Trainer._after_step

    def after(self):
        running[:] = [self]
        real(self)

    def reached():
        state = running[0]
        if when == "search":
            return state.search.begun is not None
        return state.epoch == 3 and state.step == 1

    patch.setattr(trainer, "asked_to_stop", asked)
    patch.setattr(trainer.Trainer, "_after_step", after)
    try:
        with pytest.warns(UserWarning):
            train.run(copy.deepcopy(model), config, *make_sets(model))
    except trainer.Stopped:
        return True
    finally:
        patch.undo()
    return False
