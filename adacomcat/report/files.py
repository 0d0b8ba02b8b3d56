"""The files of a run that a page is made of: JSON beside the checkpoint, one file a question.

    run.json          what was made, of what, by which command: compress, train, recover
    evaluation.json   accuracy, or agreement with the dense model: evaluate --record
    latency.json      milliseconds: profile --record
    sensitivity.json  what each rank of each site hurts: inspect --sensitivity --record
    pareto.json       models of several sizes: pareto
    pictures.json     attention maps and neighbours of a user's images: report --images
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adacomcat.errors import UserError, reason
from adacomcat.utils.files import atomic_write_text, make_folder
from adacomcat.utils.text import parse_json, read_text, to_json

NAMES = ("run", "evaluation", "latency", "sensitivity", "pareto", "pictures")
FORMAT = 1


def record(folder: str | Path, name: str, content: Mapping[str, Any]) -> Path:
    """Write one of the files of ``NAMES``; the folder is made where it is missing.

    Raises:
        UserError: it cannot be written, or a number is NaN or infinite.
    """
    path = Path(folder) / f"{name}.json"
    text = to_json({"format": FORMAT} | dict(content), indent=1)
    try:
        make_folder(folder)
        # Paths on a command line may hold bytes that are no UTF-8.
        atomic_write_text(path, text.encode("utf-8", "replace").decode("utf-8"), durable=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; name another folder, or mend this "
                        "one") from error
    return path


def recorded(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Name → content of every file that the folder has.

    Raises:
        UserError: the folder has none, or one is damaged.
    """
    found = {}
    for name in NAMES:
        path = Path(folder) / f"{name}.json"
        if path.is_file():
            found[name] = _content(path)
    if not found:
        raise UserError(f"{folder} holds no results: there is none of "
                        f"{', '.join(name + '.json' for name in NAMES)}")
    return found


def _content(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({reason(error)}); make it anew") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no file of results of this version; make it anew")
    return content
