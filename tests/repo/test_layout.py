"""Imports run one way between the rooms of adacomcat/; files and functions stay readable."""

import ast
import shutil
from pathlib import Path

import import_graph
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adacomcat"
FOLDERS = ("adacomcat", "kernels", "tests", "tools", "bench", "examples", "csrc")
MOST_LINES = 400  # of a file
MOST_FUNCTION_LINES = 60


def named(imports: list[import_graph.Import]) -> list[str]:
    return [f"{found.importer}:{found.line} imports {found.imported}" for found in imports]


def test_imports_run_one_way():
    imports = import_graph.read_imports(PACKAGE)
    assert len(imports) > 100
    assert not named(import_graph.upward(imports))
    assert not import_graph.circles(set(import_graph.arrows(imports)))
    assert not import_graph.circles({(found.importer, found.imported) for found in imports})


def test_no_import_waits_inside_a_function():
    assert not named(import_graph.late_imports(import_graph.read_imports(PACKAGE)))


def test_every_room_has_its_place():
    rooms = {path.stem for path in PACKAGE.iterdir()
             if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").exists())}
    assert rooms <= set(import_graph.DIRECTION)


@pytest.fixture
def copied(tmp_path) -> Path:
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "kernels")
    return Path(shutil.copytree(PACKAGE, tmp_path / "adacomcat", ignore=ignored))


@pytest.mark.parametrize(("file", "line", "where"), [
    ("sites.py", "from adacomcat.compression import compress", "upward"),
    ("ops/reference.py", "import adacomcat.layers.linear", "upward"),
    ("cost.py", "def f():\n    from adacomcat.errors import UserError", "late_imports"),
    ("layers/linear.py", "def f():\n    from adacomcat import train", "upward"),
])
def test_an_import_turned_around_is_found(file, line, where, copied):
    path = copied / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    found = getattr(import_graph, where)(import_graph.read_imports(copied))
    importer = f"adacomcat.{file.removesuffix('.py').replace('/', '.')}"
    assert any(entry.importer == importer for entry in found)


def test_circles_are_found():
    edges = {("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "d2"), ("e", "a")}
    assert import_graph.circles(edges) == [["a", "b", "c"]]


def python_files() -> list[Path]:
    return [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def test_files_are_short():
    files = [path for folder in FOLDERS for ending in ("*.py", "*.h", "*.cpp", "*.cu", "*.cuh")
             for path in (ROOT / folder).rglob(ending) if "build" not in path.parts]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 200
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def test_functions_are_short():
    """A Triton kernel's signature does not count: every stride is an argument of its own."""
    long = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                kernel = path.is_relative_to(ROOT / "kernels")
                first = node.body[0].lineno if kernel else node.lineno
                if node.end_lineno - first >= MOST_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long
