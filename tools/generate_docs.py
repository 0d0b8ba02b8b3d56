"""Writes the tables of docs/ that the code knows best; tests compare them with the code.

    python tools/generate_docs.py             # backends, command line and timm's families
    python tools/generate_docs.py backends    # one of them

A page marks the place of a table with ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {"backends": "backends.md", "choices": "backends.md", "commands": "command-line.md",
         "families": "families.md", "doors": "families.md", "cost": "many-machines.md",
         "reference": "published-training.md", "presets": "published-training.md"}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def region(page: str, name: str) -> str:
    """What stands between the two marks of ``name`` in the text of a page."""
    found = _marks(name).search(page)
    if found is None:
        raise ValueError(f"the page has no marks for {name}")
    return found[2].strip()


def _marks(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- generated: {name} -->\n)(.*?)(<!-- end: {name} -->)", re.DOTALL)


# Backends


def _public_ops() -> list[str]:
    """The functions among what ``adacomcat.ops`` exports; the rest are modules."""
    from adacomcat import ops

    return [name for name in ops.__all__ if callable(getattr(ops, name))]


def backends() -> str:
    """Op × backend: the dtypes that a kernel takes."""
    from adacomcat import kernels
    from adacomcat.ops import backends

    def names(dtypes: Iterable[object]) -> str:
        return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def cell(op: str, able: Sequence[str]) -> str:
        if op not in able:
            return "–"
        decomposition = op in backends.DECOMPOSITIONS
        return names(backends.DECOMPOSITION_DTYPES if decomposition else backends.KERNEL_DTYPES)

    every = dict.fromkeys((*_public_ops(), *backends.CPP_OPS, *kernels.KERNELS, *backends.CUDA_OPS))
    columns = (backends.CPP_OPS, kernels.KERNELS, backends.CUDA_OPS)
    return markdown_table(
        ("op", "`cpp`: CPU", "`triton`: GPU", "`cuda`: GPU"),
        ((f"`{op}`", *(cell(op, able) for able in columns)) for op in every))


def choices() -> str:
    """Op × situation: the backend that runs where nobody asks for another."""
    from adacomcat import kernels
    from adacomcat.ops import backends

    def on_gpu(op: str, triton: Sequence[str]) -> str:
        if op in backends.CUDA_FIRST:
            return "`cuda`"
        return "`triton`" if op in triton else "`reference`"

    every = dict.fromkeys((*_public_ops(), *kernels.KERNELS, *backends.CUDA_OPS))
    (major, minor), predicted = backends.MEASURED_CAPABILITY, backends.PREDICTED_CAPABILITY
    return markdown_table(
        ("op", "CPU", f"GPU from {predicted[0]}.{predicted[1]} on, 16 bits, inference",
         f"GPU from {major}.{minor} on, 16 bits, training", "GPU, else",
         "GPU without Triton, 16 bits, inference"),
        ((f"`{op}`", "`cpp`" if op in backends.CPP_OPS else "`reference`",
          on_gpu(op, backends.TRITON_FOR_INFERENCE), on_gpu(op, backends.TRITON_FOR_TRAINING),
          f"`cuda` from {predicted[0]}.{predicted[1]} on, else `reference`"
          if op in backends.CUDA_FIRST else "`reference`",
          "`cuda`" if op in backends.CUDA_WITHOUT_TRITON else "as with it") for op in every))


# Command line


def commands() -> str:
    """Every command with its flags, as the parsers know them."""
    from adacomcat.cli.arguments import COMMANDS, REQUIRED, build_parser

    parsers = next(action.choices for action in build_parser()._actions
                   if isinstance(action, argparse._SubParsersAction))
    return "\n\n".join(
        f"## adacomcat {name}\n\n{summary}\n\n{_required(REQUIRED[name])}{_flags(parsers[name])}"
        for name, (summary, _) in COMMANDS.items())


def _required(names: Sequence[str]) -> str:
    flags = ", ".join(f"`--{name.replace('_', '-')}`" for name in names)
    return f"Required: {flags}.\n\n" if flags else ""


def _flags(parser: argparse.ArgumentParser) -> str:
    tables = []
    for group in parser._action_groups:
        rows = [(_spelling(action), _help(action)) for action in group._group_actions]
        if rows:
            title = "general" if group.title == "options" else str(group.title)
            tables.append(markdown_table((title, "meaning"), rows))
    return "\n\n".join(tables)


def _spelling(action: argparse.Action) -> str:
    value = str(action.metavar or "")
    if not value and action.choices:
        value = "|".join(action.choices)
    if not value and action.nargs != 0:
        value = action.dest.upper()
    return ", ".join(f"`{name}`" for name in action.option_strings) + (
        f" `{value}`".replace("|", "\\|") if value and action.nargs != 0 else "")


def _help(action: argparse.Action) -> str:
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return text.replace("|", "\\|") or "–"


# Doors


def doors() -> str:
    """Models of every library, at every step."""
    import doors

    return markdown_table(doors.HEADER, doors.rows())


# timm's families


def families() -> str:
    """timm's families, and the attentions that do not fold; from the census of ``zoo.py``."""
    import zoo
    import zoo_tables

    return zoo_tables.tables(zoo.read_census())


# Training on many machines


def cost() -> str:
    """Model × bytes that a training step moves, and that a run holds."""
    import training_cost

    return training_cost.table()


# The published training


def reference() -> str:
    """The reference's flags beside ours."""
    import reference_flags

    table = markdown_table(("ComCAT's flag", "ours", "remark"), reference_flags.rows())
    without = ", ".join(f"`{flag}`" for flag in reference_flags.without())
    return f"{table}\n\nNothing stands for {without}: the published commands do not use them."


def presets() -> str:
    """What each preset sets, beside the default."""
    from adacomcat.distill import TrainConfig
    from adacomcat.utils.presets import PRESETS

    defaults, names = TrainConfig(), [name for name in PRESETS if PRESETS[name]]
    return markdown_table(
        ("setting", "default", *(f"`--preset {name}`" for name in names)),
        ((f"`{setting}`", str(getattr(defaults, setting)),
          *(str(PRESETS[name][setting]) for name in names)) for setting in PRESETS[names[0]]))


TABLES = {"backends": backends, "choices": choices, "commands": commands, "families": families,
          "doors": doors, "cost": cost, "reference": reference, "presets": presets}


def write(name: str) -> None:
    page = DOCS / PAGES[name]
    table = TABLES[name]()
    text = page.read_text(encoding="utf-8")
    page.write_text(_marks(name).sub(lambda found: f"{found[1]}\n{table}\n\n{found[3]}", text),
                    encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the generated tables of docs/.")
    parser.add_argument("names", nargs="*", choices=[*TABLES, []], default=list(TABLES))
    for chosen in parser.parse_args().names:
        print(f"{chosen} → docs/{PAGES[chosen]}", file=sys.stderr)
        write(chosen)
