"""The ImageNet recipe: its commands parse, and both its files run on generated pictures."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml

import adacomcat
from adacomcat import cost
from adacomcat.cli.main import parse

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples/imagenet"
COMMANDS = [shlex.split(line) for block in
            re.findall(r"^```bash\n(.*?)^```$", (RECIPE / "README.md").read_text(), re.M | re.S)
            for line in block.strip().splitlines()]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_parses(words, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] == "python":
        assert Path(words[1]).exists()
        return
    args = parse(words[words.index("adacomcat") + 1:])
    assert getattr(args, "config", None) is None or args.keep_params in (0.5, 0.39)


def test_both_recipes_run_for_twenty_steps(tmp_path) -> None:
    done = subprocess.run([sys.executable, RECIPE / "dry_run.py", "--steps", "20", "-o", tmp_path],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("deit_small", "deit_base"):
        recipe = yaml.safe_load((RECIPE / f"{name}.yaml").read_text())
        small = adacomcat.load(tmp_path / name)
        config = small.adacomcat_config
        assert config["architecture"] == recipe["model"]
        dense = timm.create_model(config["architecture"], **config["model_args"])
        kept = cost.model_params(small) / cost.model_params(dense)
        assert 0.8 * recipe["keep-params"] < kept <= recipe["keep-params"]
    assert "epoch 2 of 2" in done.stderr
