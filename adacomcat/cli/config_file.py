"""The YAML file of ``-c`` as words of a command line, and values in YAML's spelling.

The parser of the command line judges both alike: a scalar of the file is the text that stands
there, so that ``off``, dates and ``1e-5`` are what they would be as a flag.
"""

import argparse
import json
import math
from collections.abc import Collection
from typing import Any

from adacomcat.errors import UserError
from adacomcat.utils.text import read_text

MOST_BYTES = 64 << 10  # of the file; its parser is slow
DEEPEST = 16  # lists and mappings inside each other
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
NOTHING = ("", "~", "null")


def flags_of(args: argparse.Namespace, exclusive: Collection[str],
             without: Collection[str]) -> list[str]:
    """The entries of ``args.config`` as flags with their values.

    Args:
        args: the parsed command line, with all of its command's flags.
        exclusive: destinations of which one at most is given.
        without: destinations whose entries are left out.

    Raises:
        UserError: the file cannot be read, or an entry is no flag of this command.
    """
    known = vars(args).keys() - {"command", "config", "version"}
    entries = {str(key).replace("-", "_"): value for key, value in _read(args.config).items()}
    unknown = sorted(entries.keys() - known)
    if unknown:
        raise UserError(f"{args.config}: {args.command} has no {', '.join(map(flag, unknown))}")
    words: list[str] = []
    for name, value in entries.items():
        if value in NOTHING or (without and name in exclusive):
            continue
        if not isinstance(getattr(args, name), bool):
            words += _words(flag(name), value)
        elif str(value).lower() in TRUE:
            words.append(flag(name))
        elif str(value).lower() not in FALSE:
            raise UserError(f"{args.config}: {name}: {value!r:.60} is no value of {flag(name)}; "
                            "it is true or false")
    return words


def flag(name: str) -> str:
    """'--keep-params' from 'keep_params'."""
    return "--" + name.replace("_", "-")


def _read(path: str) -> dict[str, Any]:
    import yaml
    text = read_text(path, MOST_BYTES)
    try:
        entries = _parse(text, yaml.BaseLoader)
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(entries or {}, dict):
        raise UserError(f"{path}: 'flag: value' lines are expected")
    return entries or {}


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [flag, *(f"{key}={_flow(item)}" for key, item in value.items())]
    if isinstance(value, list):
        return [flag, *map(_flow, value)]
    return [f"{flag}={value}"]


def _flow(value: Any) -> str:
    """Nested lists and mappings on one line of YAML."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return value


def value_of(text: str) -> Any:
    """The number, word, list or mapping that ``text`` spells in YAML; 1e-5 is a number too.

    Raises:
        ValueError: it spells nothing that JSON could hold.
    """
    import yaml
    value = _parse(text, yaml.SafeLoader)
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError("only finite numbers, words, lists and mappings are taken") from error
    return value


def _parse(text: str, loader: Any) -> Any:
    """YAML without aliases, of which a few lines can stand for terabytes.

    Raises:
        ValueError: it is no YAML, has an alias, or is nested too deeply.
    """
    import yaml
    opening = (yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken,
               yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)
    closing = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)
    try:
        depth = 0
        for token in yaml.scan(text):
            depth += isinstance(token, opening) - isinstance(token, closing)
            if isinstance(token, yaml.AliasToken) or depth > DEEPEST:
                raise ValueError("aliases like *name are not read" if depth <= DEEPEST else
                                 "it is nested too deeply")
        return yaml.load(text, loader)
    except Exception as error:  # the parser's own, and those of what makes numbers and dates
        raise ValueError(" ".join(str(error).split())) from error
