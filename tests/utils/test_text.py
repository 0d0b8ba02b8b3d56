"""Text and JSON at the boundary: strict, bounded, and in one encoding."""

import ast
import json
import math
from pathlib import Path

import pytest

from adacomcat.errors import UserError
from adacomcat.utils.text import parse_json, read_text, to_json

ROOT = Path(__file__).parents[2]


def test_text_is_utf8_and_a_byte_order_mark_is_none_of_it(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf\xce\xb1")
    assert read_text(tmp_path / "a") == "α"


@pytest.mark.parametrize(("content", "says"), [
    (b"a\xffb", "no UTF-8 text \\(byte 1\\)"), (b"x" * 101, "more than 100 bytes")])
def test_what_is_no_text_is_refused(content, says, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_text(tmp_path / "a", most=100)


@pytest.mark.parametrize("path", ["nowhere", ".", "a" * 300, "nul\0"])
def test_files_that_cannot_be_opened(path, tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_text(f"{tmp_path}/{path}")


def test_a_source_without_an_end_is_left():
    with pytest.raises(UserError, match="more than"):
        read_text("/dev/zero", most=1000)


@pytest.mark.parametrize("text", ["[" * 200_000, "{" * 200_000, '{"a":' * 100_000, "NaN",
                                  "[1e5, -Infinity]", "9" * 5000, "", "\ufeff{}", "{'a': 1}"])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_numbers_that_are_not_finite_are_named():
    value = {"models": {"dense": {"loss": 1.0}, "small": {"loss": [0.5, math.inf]}}}
    with pytest.raises(UserError, match=r"^models\.small\.loss\.1 is NaN or infinite"):
        to_json(value)
    del value["models"]["small"]
    assert json.loads(to_json(value)) == value


def test_every_file_of_text_names_its_encoding():
    """Else it is the machine's, which on some knows no '→'."""
    wrong = []
    for path in sorted((ROOT / "adacomcat").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                modes = [arg.value for arg in (*node.args, *(k.value for k in node.keywords))
                         if isinstance(arg, ast.Constant)]
                binary = any(isinstance(mode, str) and "b" in mode for mode in modes)
                picture, descriptor = (ast.unparse(node.func) == name
                                       for name in ("Image.open", "os.open"))
                method = isinstance(node.func, ast.Attribute)
                text = called in ("read_text", "write_text") and method
                opens = called == "open" and not (binary or picture or descriptor)
                if (text or opens) and "encoding" not in {k.arg for k in node.keywords}:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong
