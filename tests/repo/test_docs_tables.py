"""Tables of docs/: ops equal what stands beside them, generated ones are current."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import generate_docs
import pytest
import timm
import torch
import torch.nn.functional as F
import zoo
import zoo_tables
from helpers.pages import DOCS, ROOT
from torch import Tensor

from adacomcat import ops

BATCH, TOKENS, WIDTH, HEADS = 2, 7, 12, 3
RANK_QK, RANK_VO, RANK = 2, 5, 4


# Ops


def table_of_ops() -> dict[str, tuple[list[str], str]]:
    """Op → (argument names, equivalent)."""
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \| `(.*)` \|$", (DOCS / "ops.md").read_text(),
                      re.MULTILINE)
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


# `ops` also exports modules, which are no ops.
@pytest.mark.parametrize("op", [name for name in ops.__all__ if callable(getattr(ops, name))])
def test_op_equals_the_line_beside_it(op):
    arguments, line = table_of_ops()[op]
    given = operands()
    actual = getattr(ops, op)(**{name: given[name] for name in arguments})
    torch.testing.assert_close(actual, eval(line, HELPERS | given), rtol=1e-9, atol=1e-9)


# Generated tables


@pytest.mark.parametrize("name", ["backends", "choices", "commands", "cost"])
def test_generated_table_is_current(name):
    page = (DOCS / generate_docs.PAGES[name]).read_text()
    assert generate_docs.region(page, name) == generate_docs.TABLES[name](), (
        f"run python tools/generate_docs.py {name}")


@pytest.fixture(scope="module")
def families() -> str:
    """The tables of timm's families, if they are of this timm."""
    page = (DOCS / "families.md").read_text()
    if f"timm {timm.__version__}." not in page:
        pytest.skip(f"the table is of another timm than {timm.__version__}")
    return generate_docs.region(page, "families")


def members(family: str) -> list[zoo.Entry]:
    return [zoo.entry(name, family) for name in timm.list_models(module=family)]


@pytest.mark.parametrize("family", ["convit", "csatv2", "mobilevit", "visformer"])
def test_family_is_current(family, families):
    found = members(family)
    assert f"| {' | '.join(zoo_tables.row(family, found))} |" in families
    for why, attentions in zoo_tables.unknown_rows(found):
        line = next(line for line in families.splitlines() if line.startswith(f"| {why} |"))
        assert all(attention in line for attention in attentions.split(", "))


def test_every_family_of_timm_has_a_row_or_is_counted(families):
    listed = re.findall(r"^\| `(\w+)` \| \d", families, re.MULTILINE)
    left_out = set(zoo.families()) - set(listed)
    count = sum(len(timm.list_models(module=family)) for family in left_out)
    assert len(listed) > 50
    assert f"The other {count} architectures, of {len(left_out)} modules" in families


def test_a_family_without_attention_whose_linear_layers_are_few_is_left_out():
    assert not zoo_tables.listed([zoo.entry("resnet10t", "resnet")])


# Errors


def message(node: ast.expr, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """The messages that an expression can be, with … for what varies.

    functions: those of the same file, by name; what they return is looked up.
    """
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…"
                        for part in node.values)]
    if isinstance(node, ast.BinOp):
        return [a + b for a in message(node.left, functions)
                for b in message(node.right, functions)]
    if isinstance(node, ast.IfExp):
        return [*message(node.body, functions), *message(node.orelse, functions)]
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) in functions:
        return [text for inner in ast.walk(functions[node.func.id])
                if isinstance(inner, ast.Return) for text in message(inner.value, functions)]
    return ["…"]


def raised(*names: str) -> Iterator[tuple[Path, str]]:
    """(file, message) of every call of these in the package."""
    for path in sorted((ROOT / "adacomcat").rglob("*.py")):
        tree = ast.parse(path.read_text())
        functions = {node.name: node for node in ast.walk(tree)
                     if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args:
                called = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
                if called in names:
                    for text in message(node.args[0], functions):
                        yield path, re.sub("…+", "…", " ".join(text.split()))


def explained() -> set[str]:
    """The messages that the page lists, one for each row."""
    page = (DOCS / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| .", page, re.MULTILINE)
    return {re.sub("…+", "…", row) for row in rows}


def test_every_error_of_users_is_explained():
    messages = list(raised("UserError", "ArgumentTypeError", "warn"))
    assert len(messages) > 80
    missing = [(path.name, text) for path, text in messages
               if text != "…" and not any(row in text for row in explained())]
    assert not missing


def test_every_error_is_explained_once():
    rows = re.findall(r"^\| `(.+?)` \| .", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))


def test_no_error_is_explained_that_nothing_raises():
    messages = [text for _, text in raised("UserError", "ArgumentTypeError", "warn")]
    assert not [row for row in explained() if not any(row in text for text in messages)]
