"""Folders of Hugging Face transformers, which has its own format for them.

config.json has the plan as the method 'adacomcat' of those that quantise; see
``entrypoint/transformers.py``.
"""

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from adacomcat.checkpoint.config import CONFIG
from adacomcat.convert.plain import require_not_optimized
from adacomcat.errors import UserError, reason
from adacomcat.utils.files import atomic_folder
from adacomcat.utils.text import parse_json, read_text


def is_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is one of transformers."""
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def is_pretrained_folder(folder: Path) -> bool:
    """Whether transformers wrote ``folder``: its config.json names the class of its model."""
    try:
        config = parse_json(read_text(folder / CONFIG))
    except (OSError, ValueError, UserError):
        return False
    return isinstance(config, dict) and {"model_type", "architectures"} <= config.keys()


def save_pretrained(model: Any, folder: Path) -> None:
    """``model.save_pretrained``, the folder whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    require_not_optimized(model, "save")
    try:
        with atomic_folder(folder, last=CONFIG) as scratch:
            model.save_pretrained(scratch)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def load_pretrained(folder: Path) -> nn.Module:
    """The model of a local folder, of the class that wrote it, in eval mode.

    Raises:
        UserError: transformers is not installed, or cannot make the model.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{folder} is a model of transformers, which is not installed; pip install "
                        "'adacomcat[transformers]'") from error
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = getattr(transformers, config["architectures"][0])
        model, found = kind.from_pretrained(folder, local_files_only=True,
                                            output_loading_info=True)
    except Exception as error:  # whatever transformers stumbles over
        raise UserError(f"transformers cannot load {folder}: {reason(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{folder} lacks {len(missing)} weights of its model, like {missing[0]}")
    return model.eval()
