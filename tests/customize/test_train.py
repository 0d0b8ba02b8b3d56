"""Customising a tiny pipeline: the loss, prior preservation, and exact resuming."""

import pytest
import torch
from helpers import diffusion
from PIL import Image
from torch.nn import functional as F

from adacomcat import UserError
from adacomcat.customize import CustomizeConfig, adapter_parameters, read_pictures, train
from adacomcat.customize.pipeline import encode_prompt, generate, open_pipeline, picture_grid
from adacomcat.customize.trainer import CustomizeTrainer
from adacomcat.utils import stopping
from adacomcat.utils.stopping import Stopped

QUICK = {"instance_prompt": "a photo of a sks shoe", "steps": 6, "batch_size": 2, "seed": 3}


@pytest.fixture
def pictures(tmp_path):
    """Four grey pictures in a folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for at in range(4):
        values = torch.randint(256, (20, 24), dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(folder / f"{at}.png")
    return folder


def trained(folder, pipe=None, **settings):
    pipe = pipe or diffusion.pipeline()
    class_folder = settings.pop("class_folder", None)
    found = train(pipe, read_pictures(pipe, folder), CustomizeConfig(**QUICK | settings),
                  class_folder=class_folder)
    return pipe, found


def test_pictures_fit_the_pipeline(pictures):
    found = read_pictures(diffusion.pipeline(), pictures)
    assert found.shape == (4, 1, 16, 16)
    assert -1 <= found.min() < -0.5 and 0.5 < found.max() <= 1


def test_training_lowers_the_loss_and_leaves_the_base(pictures):
    pipe = diffusion.pipeline()
    before = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    _, found = trained(pictures, pipe, steps=40, lr=1e-2)
    assert sum(found["losses"][-10:]) < 0.97 * sum(found["losses"][:10])
    assert found["attentions"] == 14
    after = dict(pipe.unet.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert any(p.any() for name, p in after.items() if name.endswith(".o"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_formula(prediction, pictures, tmp_path):
    """One picture without spread in its latents, one step: noise by hand, from its definition."""
    pipe = diffusion.pipeline(prediction_type=prediction)
    images = read_pictures(pipe, pictures)[:1]
    config = CustomizeConfig(**QUICK | {"batch_size": 1, "class_prompt": "a shoe",
                                        "prior_weight": 0.5})
    trainer = CustomizeTrainer(pipe, config, images, dict(pipe.unet.named_parameters()),
                               class_pictures=images.flip(-1))
    seen = {}
    forward = pipe.unet.forward

    def spy(noisy, times, words):
        found = forward(noisy, times, words)
        seen.update(noisy=noisy, times=times, words=words, found=found.sample)
        return found

    pipe.unet.forward = spy
    for concept in trainer.concepts:
        concept.std.zero_()
    loss = trainer._loss()
    clean = torch.cat([concept.mean for concept in trainer.concepts])
    kept = pipe.scheduler.alphas_cumprod[seen["times"]].view(-1, 1, 1, 1)
    noise = (seen["noisy"] - kept.sqrt() * clean) / (1 - kept).sqrt()
    wanted = noise if prediction == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * clean
    instance, known = (F.mse_loss(a, b) for a, b in zip(seen["found"], wanted, strict=True))
    torch.testing.assert_close(loss, instance + 0.5 * known, rtol=1e-3, atol=1e-4)
    prompts = torch.cat([encode_prompt(pipe, "a photo of a sks shoe"),
                         encode_prompt(pipe, "a shoe")])
    assert torch.equal(seen["words"], prompts)
    assert (noise.mean().abs() < 0.3) and 0.7 < noise.std() < 1.3


@pytest.mark.parametrize("prior", [False, True])
def test_resumed_runs_end_with_the_same_bits(prior, pictures, tmp_path, monkeypatch):
    prior = {"class_prompt": "a shoe", "num_class_images": 2,
             "class_folder": tmp_path / "class"} if prior else {}
    whole, _ = trained(pictures, **prior)
    state = {"state_dir": str(tmp_path / "state")}
    asked = iter([None, None, stopping.signal.SIGTERM])
    monkeypatch.setattr("adacomcat.customize.trainer.asked_to_stop", lambda: next(asked, None))
    with pytest.raises(Stopped, match="step 3"):
        trained(pictures, **prior, **state)
    resumed, found = trained(pictures, **prior, **state, resume=True)
    assert len(found["losses"]) == 6
    for ours, theirs in zip(adapter_parameters(whole), adapter_parameters(resumed), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", ["rank", "lr", "pictures"])
def test_states_of_other_runs_are_refused(change, pictures, tmp_path):
    state = {"state_dir": str(tmp_path / "state"), "checkpoint_steps": 2}
    trained(pictures, **state)
    other = {"rank": {"rank": 3}, "lr": {"lr": 1e-3}, "pictures": {}}[change]
    if change == "pictures":
        (pictures / "0.png").unlink()
    with pytest.raises(UserError, match=f"cannot resume: .*{change}"):
        trained(pictures, **state, **other, resume=True)


def test_class_pictures_are_made_once(pictures, tmp_path):
    folder = tmp_path / "class"
    prior = {"class_prompt": "a shoe", "num_class_images": 2, "class_folder": folder, "steps": 1}
    trained(pictures, **prior)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == ["0000.png", "0001.png"]
    (folder / "0001.png").unlink()
    trained(pictures, **prior)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_gradient_checkpointing_computes_the_same(pictures):
    _, plain = trained(pictures, steps=3)
    _, saving = trained(pictures, steps=3, gradient_checkpointing=True)
    assert plain["losses"] == pytest.approx(saving["losses"], rel=1e-4)


def test_pictures_depend_on_seed_and_place_alone():
    pipe = diffusion.pipeline()
    prompts = ["a boot", "a shoe", "a boot"]
    together = generate(pipe, prompts, steps=2, batch=3)
    alone = generate(pipe, prompts, steps=2, batch=1)
    for ours, theirs in zip(together, alone, strict=True):
        pixels = [torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).int()
                  for one in (ours, theirs)]
        assert (pixels[0] - pixels[1]).abs().max() <= 1
    assert together[0].tobytes() != together[2].tobytes()
    assert picture_grid(together, 2, scale=2).size == (64, 64)


def test_pipelines_in_half_precision_are_opened_in_single(tmp_path):
    diffusion.pipeline().to(torch.float16).save_pretrained(tmp_path)
    pipe = open_pipeline(str(tmp_path), torch.device("cpu"))
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert len(generate(pipe, ["a shoe"], steps=1)) == 1


@pytest.mark.parametrize(("settings", "message"), [
    ({"instance_prompt": "a photo of a shoe"}, "lacks the token 'sks'"),
    ({"class_prompt": "a sks shoe"}, "without the token"),
    ({"token": "two words"}, "token must be one word"),
    ({"rank": 0}, "rank must be a whole number"),
    ({"init": "random"}, "unknown init"),
    ({"class_prompt": "a shoe"}, "needs a folder"),
    ({"resume": True}, "resume needs the folder"),
    ({"lr": 1e9, "init": "linear", "clip_grad": 0}, "a lower lr may mend it"),
])
def test_wrong_settings_are_refused(settings, message, pictures):
    with pytest.raises(UserError, match=message):
        trained(pictures, **settings)


def test_other_pipelines_are_refused(tmp_path, pictures):
    from diffusers import FlowMatchEulerDiscreteScheduler
    pipe = diffusion.pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="not FlowMatchEulerDiscreteScheduler"):
        train(pipe, torch.zeros(1, 1, 16, 16), CustomizeConfig(**QUICK))
    pipe = diffusion.pipeline()
    pipe.unet = None
    with pytest.raises(UserError, match="has no unet"):
        train(pipe, torch.zeros(1, 1, 16, 16), CustomizeConfig(**QUICK))
    device = torch.device("cpu")
    with pytest.raises(UserError, match="no model_index.json"):
        open_pipeline(str(pictures), device)
    with pytest.raises(UserError, match="cannot open the pipeline"):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "model_index.json").write_text("{}")
        open_pipeline(str(tmp_path / "broken"), device)
