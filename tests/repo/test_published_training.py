"""The four published commands beside ours: they say the same, and ours run on few pictures."""

import importlib.util
import shlex

import pytest
import reference_flags
from helpers.pages import DOCS, ROOT, adacomcat_arguments, blocks, commands

import adacomcat
from adacomcat.cli.arguments import build_parser
from adacomcat.cli.commands import train
from adacomcat.cli.main import main, parse

PAGE = DOCS / "published-training.md"
REFERENCE = [shlex.split(block.text.replace("\n", " ")) for block in blocks(PAGE, "text")]
OURS = [words for block in blocks(PAGE, "bash") for words in commands(block)]
STAGES = ["small-search", "small-training", "base-search", "base-training"]


def values(words: list[str]) -> dict[str, str]:
    """Flag → what stands behind it, '' where another flag does."""
    follows = [*words[1:], "--"]
    return {word: "" if next_word.startswith("-") else next_word
            for word, next_word in zip(words, follows, strict=True) if word.startswith("-")}


@pytest.mark.parametrize(("reference", "ours"), list(zip(REFERENCE, OURS, strict=True)),
                         ids=STAGES)
def test_ours_say_what_the_reference_says(reference, ours):
    theirs, found = values(reference), values(ours)
    processes = next((int(word.partition("=")[2]) for word in ours
                      if word.startswith("--nproc")), 1)
    compared = 0
    for flag, value in theirs.items():
        flag_of_ours, remark = reference_flags.REFERENCE.get(flag, ("", "launcher"))
        assert flag_of_ours or remark, flag
        if flag == "--batch-size":
            assert int(found["-b"]) == processes * int(value)
        elif flag == "--target-params-reduction":
            assert float(found["--keep-params"]) == pytest.approx(1 - float(value))
        elif flag_of_ours in found and flag not in ("--model", "--data-path", "--output_dir"):
            assert found[flag_of_ours] == value, flag
        else:
            continue
        compared += 1
    assert compared >= 4
    config = train._config(parse(adacomcat_arguments(ours)), "state")
    assert config.kd == theirs["--distillation-type"] == "hard"
    assert config.align == ("comcat" if "--with-align" in theirs else "none")
    assert config.lr_base == (None if "--unscale-lr" in theirs else 512)
    assert config.warmup_epochs == 0 and config.clip_grad is None
    assert (config.keep_params is None) == ("--search-rank" not in theirs)


def test_every_flag_of_ours_exists():
    def named(command):
        parsers = build_parser()._subparsers._group_actions[0].choices
        return {word for action in parsers[command]._actions for word in action.option_strings}

    words = [word for ours, _ in reference_flags.REFERENCE.values() for word in ours.split()]
    assert {word for word in words if word.startswith("-")} <= named("train")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with pictures, and a dense model to teach."""
    spec = importlib.util.spec_from_file_location("dry_run", ROOT / "examples/imagenet/dry_run.py")
    dry_run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dry_run)
    folder = tmp_path_factory.mktemp("published")
    dry_run.write_pictures(folder / "pictures", 64)
    tiny = ["--img-size", "32", "--num-classes", "4", "--no-pretrained", "--model-kwargs",
            *dry_run.MODEL]
    assert main(["train", "-m", "deit_small_patch16_224", *tiny, "--data",
                 str(folder / "pictures"), "--dense", "--epochs", "0", "-b", "8", "-o",
                 str(folder / "teacher")]) == 0
    return folder, tiny


SHORT = ["-b", "8", "--epochs", "2", "--steps", "2", "-j", "0", "--device", "cpu", "--no-report"]


@pytest.mark.parametrize("name", ["small", "base"])
def test_both_stages_of_a_model_run(name, workplace, monkeypatch):
    folder, tiny = workplace
    monkeypatch.chdir(folder)
    search, training = (OURS[STAGES.index(f"{name}-{stage}")] for stage in ("search", "training"))
    replaced = {"/data/imagenet": "pictures"}
    models = {f"deit_{name}_patch16_224": "teacher"}
    words = [replaced.get(word, word) for word in adacomcat_arguments(search)]
    assert main([*words, *tiny, *SHORT]) == 0
    found = adacomcat.load(folder / f"runs/{name}_auto")
    assert all(block.attn.bq.abs().max() == 0 for block in found.blocks)
    words = [(replaced | models).get(word, word) for word in adacomcat_arguments(training)]
    assert main([*words, *SHORT]) == 0
    tuned = adacomcat.load(folder / f"runs/{name}_auto_finetune")
    assert tuned.rank_plan == found.rank_plan
    assert all(block.attn.bq.abs().max() > 0 for block in tuned.blocks)
    assert (folder / f"runs/{name}_auto_finetune/best").is_dir()
