"""What README and docs show is true: code runs, commands parse, files and flags exist."""

import re
import textwrap
from pathlib import Path

import import_graph
import pytest
import reference_flags
from helpers.pages import (
    CONTRIBUTING,
    DOCS,
    GUIDES,
    PROSE,
    README,
    ROOT,
    Block,
    adacomcat_arguments,
    all_commands,
    blocks,
    commands,
)

from adacomcat.cli.arguments import COMMANDS
from adacomcat.cli.main import main, parse

RUN = [page for page in GUIDES if blocks(page, "python", "bash")]
CALLS = [argv for words in all_commands(*PROSE) if (argv := adacomcat_arguments(words))]
# Appended, so that a run is short: of a flag that is given twice the last one counts.
SHORTER = {"train": ["--epochs", "2", "--steps", "2"], "evaluate": ["--min-accuracy", "0"],
           "profile": ["--repeats", "1"]}
OTHER_FLAGS = {"--no-build-isolation", "--no-deps", "--help", "--nproc-per-node", "--nnodes",
               "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_python(block: Block, page: Path, namespace: dict[str, object]) -> None:
    """With the page's own line numbers, for the traceback of what fails."""
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    exec(code, namespace)


def run_shell(block: Block) -> None:
    for words in commands(block):
        argv = adacomcat_arguments(words)
        if argv is not None and words[0] == "adacomcat":
            assert main([*argv, *SHORTER.get(argv[0], [])]) == 0, " ".join(words)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name)
def test_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python", "bash"):
        if block.reason is not None:
            continue
        if block.language == "python":
            run_python(block, page, namespace)
        else:
            run_shell(block)


def test_code_that_does_not_run_here_needs_what_is_missing():
    reasons = {block.reason for page in GUIDES for block in blocks(page, "python", "bash")}
    assert all(reason is None or reason.startswith("needs ") for reason in reasons)
    assert not any(block.reason for page in GUIDES for block in blocks(page, "python"))


@pytest.mark.parametrize("argv", CALLS, ids=" ".join)
def test_command_parses(argv, tmp_path, monkeypatch):
    for recipe in ROOT.glob("examples/*/*.yaml"):
        copy = tmp_path / recipe.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(recipe.read_text())
    for block in blocks(DOCS / "training.md", "yaml"):
        (tmp_path / block.text.splitlines()[0].removeprefix("# ")).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    args = parse(argv)
    assert args.command == argv[0]
    if args.config == "deit_small.yaml":
        assert (args.keep_params, args.search, args.amp) == (0.5, "adaptive", True)


def test_every_command_is_shown():
    assert {argv[0] for argv in CALLS} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert COMMANDS[command][0] in " ".join(shown.split())


def test_every_flag_named_in_the_text_exists(capsys):
    for command in COMMANDS:
        main([command, "--help"])
    known = OTHER_FLAGS | set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for script in ROOT.glob("**/*.py"):
        if script.parts[len(ROOT.parts)] in ("examples", "bench", "tools"):
            known |= set(re.findall(r"\"(--[a-z][a-z-]*)\"", script.read_text()))
    pattern = r"(?<![\w<!-])--[a-z][a-z-]*"
    theirs = set(re.findall(pattern, " ".join(reference_flags.REFERENCE))) | {"--nproc", "--use"}
    for page in PROSE:
        named = set(re.findall(pattern, page.read_text()))
        assert named <= (known | theirs if page.name == "published-training.md" else known), page


def test_links_to_files_lead_somewhere():
    """Those of docs/ are checked by the strict build of the site."""
    pages = [page for page in PROSE if page.parent != DOCS]
    links = [(page, link) for page in pages
             for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())]
    assert links
    assert not [(page, link) for page, link in links if not (page.parent / link).exists()]


def test_files_named_in_the_text_exist():
    pattern = re.compile(
        r"`((?:adacomcat|bench|csrc|docs|examples|kernels|tests|tools)/[\w./*-]*)[^`]*`")
    named = {(page, path) for page in PROSE for path in pattern.findall(page.read_text())}
    assert named
    assert not [(page, path) for page, path in named if not list(ROOT.glob(path))]


def test_scripts_and_make_verbs_exist():
    makefile = (ROOT / "Makefile").read_text()
    for words in all_commands(*PROSE):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words


def test_readme_is_one_page_and_begins_with_code():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert lines.index("```python") < 40


def test_readme_names_machine_and_versions_of_its_table():
    measured = textwrap.dedent(README.read_text()).partition("## Measured")[2].partition("\n## ")[0]
    for fact in ("Intel Xeon", "two threads", "torch 2", "timm 1", "bench/RESULTS.md"):
        assert fact in measured


def test_readme_table_stands_in_the_report():
    """Every row of the README's table is a row of bench/RESULTS.md, on two threads with AMX."""
    report = (ROOT / "bench/RESULTS.md").read_text().partition("## On a CPU with AMX")[2]
    names = {"DeiT-S": "deit_small", "DeiT-B": "deit_base", "float32": "fp32", "bfloat16": "bf16"}
    rows = re.findall(r"^\| (DeiT-.) \| (\w+) \| (\d) \| (.*) \|$", README.read_text(),
                      re.MULTILINE)
    assert rows
    for model, dtype, batch, figures in rows:
        assert f"| {names[model]} | {names[dtype]} | {batch} | 2 | {figures} |" in report


def test_environment_variables_are_all_listed():
    python = [path for part in ("adacomcat", "kernels") for path in (ROOT / part).rglob("*.py")]
    read = {found for path in (*python, ROOT / "setup.py")
            for found in re.findall(r"environ\S*?[\[(]\"(ADACOMCAT_\w+)\"", path.read_text())}
    read |= {found for path in (ROOT / "csrc").rglob("*.cpp")
             for found in re.findall(r"getenv\(\"(ADACOMCAT_\w+)\"", path.read_text())}
    listed = set(re.findall(r"^\| `(ADACOMCAT_\w+)", (DOCS / "install.md").read_text(),
                            re.MULTILINE))
    assert read and read == listed


def test_direction_of_imports_is_the_one_that_is_tested():
    """The list in CONTRIBUTING names the packages in the order of tools/import_graph.py."""
    text = CONTRIBUTING.read_text().partition("imports go one way.")[2]
    block = re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]
    named = [word for line in block.splitlines() for word in line.partition("   ")[0].split()]
    hidden = {"__init__", "__main__"}
    assert named == [room for room in import_graph.DIRECTION if room not in hidden]


def test_walks_name_what_is_there():
    """Each row of a walk in CONTRIBUTING names a file and what of it is called."""
    rows = re.findall(r"^\| \d \| `([\w./-]+)` \| `([\w.]+)` \|", CONTRIBUTING.read_text(),
                      re.MULTILINE)
    assert len(rows) >= 10
    for file, called in rows:
        text = (ROOT / file).read_text()
        for part in called.split("."):
            assert re.search(rf"\b{part}\b", text), (file, called)
