"""Prints how the rooms of a package import each other: arrows, circles, arrows upward.

python tools/import_graph.py            the rooms of adacomcat/
python tools/import_graph.py --arrows   every arrow, with the files that draw it
python tools/import_graph.py PACKAGE    any package, by its files where it has no rooms

A room is a sub-package, or a module that lies directly in the package.
"""

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A room may import the rooms before it. ``__init__`` and ``entrypoint`` load others by need.
DIRECTION = (
    "errors", "moved", "__init__", "utils", "entrypoint", "kernels", "data", "ops", "factorize",
    "layers", "families", "sites", "plan", "convert", "quantization", "fuse", "cost", "latency",
    "checkpoint", "allocation", "calibration", "compression", "elastic", "search", "distill",
    "customize", "train", "deploy", "evaluation", "report", "cli", "__main__",
)
# Only these may import modules of the package inside a function.
LATE = ("__init__", "entrypoint", "cli")


@dataclass(frozen=True)
class Import:
    """One import statement: file ``importer`` names module ``imported``, both dotted."""

    importer: str
    imported: str
    line: int
    late: bool  # inside a function


def read_imports(package: Path) -> list[Import]:
    """Every import of one of the package's own modules, type-checking blocks left out."""
    found = []
    for path in sorted(package.rglob("*.py")):
        importer = _dotted(path, package)
        for node, late in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            found += [Import(importer, module, node.lineno, late)
                      for module in _own_modules(node, package) if module != importer]
    return found


def _dotted(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    inner = parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts
    return ".".join(inner)


def _statements(tree: ast.AST, late: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, late
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _statements(node, late or inside)


def _own_modules(node: ast.stmt, package: Path) -> set[str]:
    """Dotted modules of the package that an import statement loads."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return set()
    return {module for name in names if name.partition(".")[0] == package.name
            for module in [_longest_module(name, package)]}


def _longest_module(name: str, package: Path) -> str:
    parts = name.split(".")
    while len(parts) > 1:
        path = package.joinpath(*parts[1:])
        if path.with_suffix(".py").is_file() or path.is_dir():
            return ".".join(parts)
        parts.pop()
    return f"{package.name}.__init__"


def room(module: str) -> str:
    return module.split(".")[1]


def arrows(imports: list[Import]) -> dict[tuple[str, str], list[Import]]:
    """(from room, to room) → the imports that draw this arrow."""
    drawn: dict[tuple[str, str], list[Import]] = {}
    for found in imports:
        pair = room(found.importer), room(found.imported)
        if pair[0] != pair[1]:
            drawn.setdefault(pair, []).append(found)
    return drawn


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Strongly connected components of two nodes and more (Tarjan, 1972)."""
    after: dict[str, list[str]] = {}
    for start, end in sorted(edges):
        after.setdefault(start, []).append(end)
        after.setdefault(end, [])
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in after[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node):]
            del stack[stack.index(node):]
            if len(component) > 1:
                components.append(sorted(component))

    for node in after:
        if node not in index:
            visit(node)
    return components


def upward(imports: list[Import]) -> list[Import]:
    """Imports of a room that stands after the importer's in DIRECTION, late ones of LATE aside."""
    height = {name: level for level, name in enumerate(DIRECTION)}
    return [found for found in imports
            if not (found.late and room(found.importer) in LATE)
            and height[room(found.imported)] > height[room(found.importer)]]


def late_imports(imports: list[Import]) -> list[Import]:
    return [found for found in imports if found.late and room(found.importer) not in LATE]


def report(imports: list[Import]) -> list[str]:
    """Lines for a person: how many rooms and arrows there are, and what runs the wrong way."""
    drawn = arrows(imports)
    rooms = {name for pair in drawn for name in pair}
    files = {(found.importer, found.imported) for found in imports}
    prompt = {(found.importer, found.imported) for found in imports if not found.late}
    lines = [
        f"{len(rooms)} rooms, {len(drawn)} arrows between them, "
        f"{len(files)} imports between files",
        f"circles of rooms: {circles(set(drawn)) or 'none'}",
        f"circles of files: {circles(files) or 'none'}",
        f"circles of files without late imports: {circles(prompt) or 'none'}",
        f"imports inside functions, outside {', '.join(LATE)}: {len(late_imports(imports))}",
    ]
    if rooms <= set(DIRECTION):
        wrong = upward(imports)
        lines.append(f"arrows upward: {len(wrong)}")
        lines += [f"  {found.importer}:{found.line} imports {found.imported}" for found in wrong]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("package", nargs="?", type=Path,
                        default=Path(__file__).parents[1] / "adacomcat")
    parser.add_argument("--arrows", action="store_true", help="list every arrow with its files")
    args = parser.parse_args()
    imports = [found for found in read_imports(args.package.resolve())
               if not found.imported.endswith(".__init__")]
    print("\n".join(report(imports)))
    if args.arrows:
        for (start, end), there in sorted(arrows(imports).items()):
            print(f"  {start} → {end}: {', '.join(sorted({f.importer for f in there}))}")


if __name__ == "__main__":
    main()
