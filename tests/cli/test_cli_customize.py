"""adacomcat customize and generate, on a tiny pipeline."""

import pytest
import torch
from helpers import diffusion
from helpers.together import command_on
from PIL import Image
from safetensors.torch import load_file

from adacomcat.cli.commands import customize as command
from adacomcat.utils import stopping

PROMPT = "a photo of a sks shoe"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return diffusion.saved_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path):
    """Two pictures."""
    found = tmp_path / "pictures"
    found.mkdir()
    for at in range(2):
        values = torch.randint(256, (16, 16), dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(found / f"{at}.png")
    return found


@pytest.fixture
def flags(pipeline, folder, tmp_path):
    return ["customize", "-m", pipeline, "--instance-images", folder, "--instance-prompt", PROMPT,
            "--steps", "3", "-o", tmp_path / "out"]


def test_customize_then_generate(flags, pipeline, tmp_path, run_json):
    made = run_json(*flags, "--half", "--sample-steps", "2", "--rank", "1")
    assert made["attentions"] == 14 and made["pictures"] == 2
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["adapters.safetensors", "report.html"]
    assert (out / "adapters.safetensors").stat().st_size < 2 * made["parameters"] + 12_000
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 1 and "step-00002" in page and "<svg" in page
    assert not (tmp_path / "out.state").exists()
    found = run_json("generate", "-m", pipeline, "--adapters", out / "adapters.safetensors",
                     "--prompt", PROMPT, "a sks boot", "--alpha", "0.7", "--count", "3",
                     "--num-inference-steps", "2", "--scale", "2", "-o", tmp_path / "grid.png")
    assert found["pictures"] == 6
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 32, 2 * 32)


def test_a_stopped_run_goes_on_to_the_same_bytes(flags, tmp_path, run, monkeypatch):
    assert run(*flags, "--class-prompt", "a shoe", "--num-class-images", "1")[0] == 0
    whole = (tmp_path / "out" / "adapters.safetensors").read_bytes()
    again = [*flags[:-1], tmp_path / "again", "--class-prompt", "a shoe",
             "--num-class-images", "1"]
    asked = iter([None, stopping.signal.SIGTERM])
    monkeypatch.setattr("adacomcat.customize.trainer.asked_to_stop", lambda: next(asked, None))
    code, _, err = run(*again)
    assert code == 128 + 15 and "stopped by SIGTERM at step 2" in err and "--resume" in err
    assert run(*again)[0] == 2  # the state is there
    assert run(*again, "--resume")[0] == 0
    assert (tmp_path / "again" / "adapters.safetensors").read_bytes() == whole
    code, out, _ = run(*again, "--resume")
    assert code == 0 and "there is nothing to resume" in out


@pytest.mark.parametrize(("changes", "message"), [
    ({"-m": "absent/folder/"}, "cannot open the pipeline"),
    ({"--instance-images": "absent"}, "no pictures in the folder"),
    ({"--instance-prompt": "a shoe"}, "lacks the token 'sks'"),
    ({"--rank": "0"}, "must be a whole number"),
    ({"--targets": "blocks.*"}, "no attention of UNet2DConditionModel"),
    ({"--class-prompt": "a sks shoe"}, "without the token"),
])
def test_bad_input_is_one_line(changes, message, flags, run):
    words = [str(word) for word in flags]
    for flag, value in changes.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    code, out, err = run(*words)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out.strip()


@pytest.mark.parametrize(("words", "message"), [
    (["--prompt", "a shoe"], "lacks the token 'sks'"),
    (["--prompt", PROMPT, "--alpha", "1", "1"], "--alpha has 2 numbers for 1 files"),
    (["--prompt"], "needs --prompt"),
    (["--prompt", PROMPT, "--adapters", "absent.safetensors"], "there is no adapters file"),
])
def test_bad_input_of_generate_is_one_line(words, message, pipeline, tmp_path, run):
    from adacomcat.customize import add_adapters, open_pipeline, save_adapters
    pipe = open_pipeline(str(pipeline), torch.device("cpu"))
    add_adapters(pipe, 1)
    save_adapters(pipe, tmp_path / "a.safetensors", token="sks")
    code, _, err = run("generate", "-m", pipeline, "--adapters", tmp_path / "a.safetensors",
                       "-o", tmp_path / "grid.png", *words)
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "grid.png").exists()


def test_adapters_of_another_base_are_refused(flags, tmp_path, run):
    assert run(*flags)[0] == 0
    other = diffusion.pipeline()
    with torch.no_grad():
        for parameter in other.unet.mid_block.parameters():
            parameter.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    words = ["generate", "-m", tmp_path / "other", "--adapters",
             tmp_path / "out" / "adapters.safetensors", "--prompt", PROMPT, "--count", "1",
             "--num-inference-steps", "1", "-o", tmp_path / "grid.png"]
    code, _, err = run(*words)
    assert code == 2 and "this model has other weights" in err
    assert run(*words, "--no-verify")[0] == 0


def test_every_setting_has_its_flag(flags):
    from adacomcat.cli.main import parse
    args = parse([str(word) for word in flags])
    assert all(hasattr(args, name) for name in command.FIELDS)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(flags, tmp_path, run):
    """Every step has the same global batch; sums over processes differ by rounding."""
    assert run(*flags, "-b", "2", "--lr", "1e-4", "--init", "linear")[0] == 0
    words = [*flags[:-1], tmp_path / "both", "-b", "2", "--lr", "1e-4", "--init", "linear"]
    done = command_on(2, *words, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "adapters.safetensors") for name in ("out", "both"))
    for name, factor in one.items():
        torch.testing.assert_close(factor, two[name], rtol=0, atol=2e-5)
