"""Checkpoint folders: model.safetensors and a config.json in timm's layout, the plan inside.

    config.json   architecture   'adacomcat_vit', or timm's own name where nothing was compressed
                  model_args     base, plan (site → rank) and the keyword arguments of ``base``
                  num_classes, num_features, pretrained_cfg   as timm writes them

After ``import adacomcat``, unmodified timm loads such a folder:
``timm.create_model('local-dir:DIR', pretrained=True)``.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg, clean_state_dict
from timm.utils import unwrap_model
from torch import Tensor, nn

from adacomcat.checkpoint.gauge import with_gauge, without_gauge
from adacomcat.convert.record import compression_of
from adacomcat.entrypoint import ENTRYPOINT
from adacomcat.errors import UserError
from adacomcat.sites import DENSE
from adacomcat.utils.model import evaluating, input_size

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# Where the weights came from says nothing about where they are now.
_SOURCE_KEYS = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source",
                "architecture", "tag", "custom_load", "label_offset"}
_RUNTIME_ARGS = {"base", "plan", "device", "dtype", "drop_rate", "drop_path_rate",
                 "proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_drop_rate"}


def save(model: nn.Module, folder: str | Path, *, architecture: str | None = None,
         model_args: Mapping[str, Any] | None = None, gauge: bool = False) -> None:
    """Write ``model`` to an absent or empty ``folder``; ``load(folder)`` gives it back.

    architecture, model_args: the timm name and keyword arguments that built the dense model, where
    the model does not know them itself. gauge: leave r² redundant numbers of each factorisation of
    rank r out of the file; what is loaded is the same map, its factors rounded once more.
    """
    folder = Path(folder)
    require_empty(folder)
    model = unwrap_model(model)
    config = _describe(model, architecture, model_args)
    weights = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, tensor in model.state_dict().items()}
    if gauge:
        weights = without_gauge(model, weights)
    _require_same(model, _rebuilt(config, with_gauge(weights)), config)
    with written_whole(folder) as scratch:
        save_file(weights, scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load(folder: str | Path) -> nn.Module:
    """The model of a checkpoint folder, on the CPU, in eval mode."""
    folder = Path(folder)
    config = read_config(folder)
    weights = with_gauge(read_weights(folder / WEIGHTS))
    model = _build(config, str(folder))
    load_weights_(model, weights, str(folder))
    return model.eval()


def require_empty(folder: str | Path) -> None:
    """Refuse to write where something is already."""
    folder = Path(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} already holds something; name an absent or empty folder")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A scratch folder beside ``folder`` that takes its name only once everything is in it."""
    scratch = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        os.replace(scratch, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {folder}")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no checkpoint folder: it has no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {CONFIG} cannot be read ({error})") from error
    known = isinstance(config, dict) and isinstance(config.get("architecture"), str)
    if not known or not isinstance(config.get("model_args", {}), dict):
        raise UserError(f"{folder}: {CONFIG} names no 'architecture' with 'model_args'; "
                        "was it written by adacomcat or timm?")
    return config


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Name → tensor, from .safetensors or from a pickle read with ``weights_only=True``."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError,
            KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is truncated or no weights file: {reason}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not any(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} holds no state dict")
    return clean_state_dict(found)


def load_weights_(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load in place, or name what does not fit."""
    wanted = model.state_dict()
    differing = [f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
                 for name, tensor in wanted.items()
                 if name in weights and weights[name].shape != tensor.shape]
    problems = [f"{what}: {_some(names)}" for what, names in (
        ("missing", [name for name in wanted if name not in weights]),
        ("unexpected", [name for name in weights if name not in wanted]),
        ("of another shape", differing)) if names]
    if problems:
        raise UserError(f"{source} does not fit the model; {'; '.join(problems)}")
    model.load_state_dict(weights)


def _some(names: list[str], shown: int = 4) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def require_architecture(name: str) -> None:
    """An error with near names where timm does not know ``name``."""
    if timm.is_model(name):
        return
    near = get_close_matches(name, timm.list_models(), n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() lists all"
    raise UserError(f"timm has no model {name!r}{hint}")


def _build(config: dict[str, Any], source: str) -> nn.Module:
    """The model that ``config`` describes, weights not yet filled."""
    args = dict(config.get("model_args", {}))
    require_architecture(args.get("base", config["architecture"]))
    require_architecture(config["architecture"])
    pretrained_cfg = dict(config.get("pretrained_cfg") or {})
    if pretrained_cfg and "num_classes" in config:
        pretrained_cfg["num_classes"] = config["num_classes"]
    try:
        return timm.create_model(config["architecture"], pretrained=False,
                                 pretrained_cfg=pretrained_cfg or None, **args)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"{source}: its {CONFIG} describes no model that can be built: "
                        f"{error}") from error


def _describe(model: nn.Module, architecture: str | None,
              model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    source = dict(getattr(model, "pretrained_cfg", None) or {})
    record = compression_of(model)
    known = record.source or {}
    architecture = architecture or known.get("architecture") or source.get("architecture")
    if architecture is None:
        raise UserError("this model does not know its timm architecture; pass architecture= and "
                        "model_args=")
    if model_args is None:
        model_args = known.get("model_args", getattr(model, "_model_args", {}))
    current = _current_args(model)
    args = {k: v for k, v in model_args.items() if k not in _RUNTIME_ARGS} | current
    ranks = {name: rank for name, rank in record.ranks.items() if rank != DENSE}
    config = {
        "architecture": ENTRYPOINT if ranks else architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": _pretrained_cfg(model, source),
        "model_args": {"base": architecture, "plan": ranks, **args} if ranks else args,
    }
    return _plain(config)


def _current_args(model: nn.Module) -> dict[str, Any]:
    """What may have changed since the model was built."""
    args = {"num_classes": model.num_classes, "in_chans": input_size(model)[0]}
    pool = getattr(model, "global_pool", None)
    if isinstance(pool, str):
        args["global_pool"] = pool
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        args["img_size"] = size
    return args


def _pretrained_cfg(model: nn.Module, source: dict[str, Any]) -> dict[str, Any]:
    allowed = {field.name for field in fields(PretrainedCfg)} - _SOURCE_KEYS
    kept = {k: v for k, v in source.items() if k in allowed and v is not None}
    return kept | {"input_size": input_size(model), "num_classes": model.num_classes}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, or an error that names what JSON cannot hold."""
    for name, value in config["model_args"].items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise UserError(f"the model argument {name}={value!r} cannot be written to JSON; "
                            "pass model_args= with timm's name for it") from error
    return json.loads(json.dumps(config))


def _rebuilt(config: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    model = _build(config, "the model to save")
    load_weights_(model, weights, "the model to save, rebuilt from its architecture and "
                                  "model_args (pass them if they are incomplete),")
    return model


@torch.inference_mode()
def _require_same(model: nn.Module, rebuilt: nn.Module, config: dict[str, Any]) -> None:
    """What a state dict does not tell (pooling, activations) must be in the description too."""
    parameter = next(model.parameters())
    image = torch.randn(1, *input_size(model), generator=torch.Generator().manual_seed(0))
    image = image.to(parameter.device, parameter.dtype)
    with evaluating(model), evaluating(rebuilt):
        expected = model(image)
        found = rebuilt.to(parameter.device, parameter.dtype)(image)
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * expected.abs().max(),
                          equal_nan=True):
        raise UserError(f"{config['model_args'].get('base', config['architecture'])} with "
                        f"{config['model_args']} computes something else than this model; "
                        "pass architecture= and model_args= as it was built")
