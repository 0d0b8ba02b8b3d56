"""What README.md shows: its Python runs, its commands parse, its op table and links are true."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adacomcat import cli, ops
from adacomcat.cli.arguments import COMMANDS
from adacomcat.cli.main import parse

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BATCH, TOKENS, WIDTH, HEADS = 2, 7, 12, 3
RANK_QK, RANK_VO, RANK = 2, 5, 4


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    for block in blocks("bash"):
        for line in block.strip().splitlines():
            yield shlex.split(line)


def cli_arguments(words: list[str]) -> list[str] | None:
    """What adacomcat gets to see in a command line, if it is called there."""
    if words[0] == "torchrun":
        assert words[2:4] == ["-m", "adacomcat"]
        return words[4:]
    return words[1:] if words[0] == "adacomcat" else None


CALLS = [argv for words in commands() if (argv := cli_arguments(words)) is not None]


def test_python_blocks_run_in_order(tmp_path, tmp_path_factory):
    program = "\n".join(blocks("python")) + """
with torch.inference_mode():
    expected = small(images[:4])
    torch.testing.assert_close(again(images[:4]), expected)
    torch.testing.assert_close(same(images[:4]), expected)
    assert by_hand.rank_plan["blocks.0.mlp.fc2"] == "dense"
    assert set(quick.rank_plan.ranks.values()) == {"dense"}  # nothing takes a second here
print(adacomcat.cost.model_params(small) / adacomcat.cost.model_params(model))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1",
                                "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path,
                         capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    assert 0.45 < float(run.stdout.splitlines()[-1]) <= 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "small", "smaller"]


@pytest.mark.parametrize("argv", CALLS, ids=" ".join)
def test_command_parses(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks("yaml"):
        Path(block.splitlines()[0].removeprefix("# ")).write_text(block)
    args = parse(argv)
    assert args.command == argv[0]
    if args.config is not None:
        assert (args.keep_params, args.search, args.amp) == (0.5, "adaptive", True)


def test_every_command_is_shown():
    assert {argv[0] for argv in CALLS} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert COMMANDS[command][0] in " ".join(shown.split())


def test_every_flag_named_in_the_text_exists(capsys):
    known = {"--no-build-isolation", "--no-deps", "--help", "--nproc-per-node"}
    for command in COMMANDS:
        cli.main([command, "--help"])
    known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) <= known


def test_files_named_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    scripts = [word for words in commands() for word in words if word.endswith(".py")]
    tree = re.findall(r"(?<![\w/])([a-z_]+\.py)\b", blocks("text")[0])
    assert links and scripts and tree
    missing = [name for name in (*links, *scripts) if not (ROOT / name).exists()]
    missing += [name for name in tree
                if not any(list((ROOT / part).rglob(name)) for part in ("adacomcat", "examples"))]
    assert not missing


def test_make_verbs_exist():
    verbs = [words[1] for words in commands() if words[0] == "make"]
    makefile = (ROOT / "Makefile").read_text()
    assert verbs == ["demo", "test"]
    assert all(re.search(rf"^{verb}:", makefile, re.MULTILINE) for verb in verbs)


def table_of_ops() -> dict[str, tuple[list[str], str]]:
    """Op → (argument names, equivalent)."""
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \| `(.*)` \|$", README, re.MULTILINE)
    return {op: (arguments.split(", "), line) for op, arguments, line in rows}


def operands() -> dict[str, object]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return {
        "x": draw(BATCH, TOKENS, WIDTH), "v": draw(WIDTH, RANK), "u": draw(9, RANK),
        "bias": draw(9), "gate": draw(RANK), "residual": draw(BATCH, TOKENS, 9),
        "v1": draw(WIDTH, RANK), "u1": draw(20, RANK), "b1": draw(20), "v2": draw(20, 3),
        "u2": draw(WIDTH, 3), "b2": draw(WIDTH), "w1": draw(20, WIDTH), "w2": draw(WIDTH, 20),
        "activation": "gelu_tanh",
        "wq": draw(HEADS * RANK_QK, WIDTH), "bq": draw(HEADS * RANK_QK),
        "wk": draw(HEADS * RANK_QK, WIDTH), "wv": draw(HEADS * RANK_VO, WIDTH),
        "wo": draw(WIDTH, HEADS * RANK_VO), "bo": draw(WIDTH), "num_heads": HEADS, "scale": 0.3,
        "attn_mask": draw(BATCH, HEADS, TOKENS, TOKENS),
    }


HELPERS = {
    "F": F, "sdpa": F.scaled_dot_product_attention,
    "act": lambda x: F.gelu(x, approximate="tanh"),
    "split": lambda x: x.unflatten(2, (HEADS, -1)).transpose(1, 2),
    "merge": lambda x: x.transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize("op", ops.__all__)
def test_op_equals_the_line_beside_it(op):
    arguments, line = table_of_ops()[op]
    given = operands()
    actual = getattr(ops, op)(**{name: given[name] for name in arguments})
    torch.testing.assert_close(actual, eval(line, HELPERS | given), rtol=1e-9, atol=1e-9)


def test_environment_variables_are_all_listed():
    folders = ("adacomcat", "kernels", "setup.py")
    files = [path for name in folders for path in
             ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))]
    read = {name for path in files
            for name in re.findall(r"environ\S*?[\[(]\"(ADACOMCAT_\w+)\"", path.read_text())}
    read |= {name for path in (ROOT / "csrc").rglob("*.cpp")
             for name in re.findall(r"getenv\(\"(ADACOMCAT_\w+)\"", path.read_text())}
    listed = set(re.findall(r"^\| `(ADACOMCAT_\w+)", README, re.MULTILINE))
    assert read and read == listed
