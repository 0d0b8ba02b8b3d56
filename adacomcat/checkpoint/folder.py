"""Checkpoint folders: model.safetensors, and a config.json in timm's layout that has the plan.

    config.json   architecture   'adacomcat_vit'; where nothing was compressed timm's own name
                  model_args     base (timm's name), plan (site → rank), int8 and int4 (names of
                                 layers with such weights and scales), and base's arguments
                  num_classes, num_features, pretrained_cfg   as timm writes them
                  checksums      of the files beside it: name → XXH3 with 128 bits

After ``import adacomcat``, unmodified timm loads such a folder:
``timm.create_model('local-dir:DIR', pretrained=True)``.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from timm.utils import unwrap_model
from torch import Tensor, nn

from adacomcat.checkpoint.build import build
from adacomcat.checkpoint.config import CONFIG, NO_MODEL_ARGS, read_config
from adacomcat.checkpoint.gauge import with_gauge, without_gauge
from adacomcat.checkpoint.pretrained import (
    is_pretrained,
    is_pretrained_folder,
    load_pretrained,
    save_pretrained,
)
from adacomcat.checkpoint.weights import load_weights_, read_weights
from adacomcat.convert.plain import is_plain_form, require_not_optimized
from adacomcat.convert.quantized import quantized_layers, require_not_quantized
from adacomcat.convert.record import compression_of, ranks_as_they_are
from adacomcat.errors import UserError
from adacomcat.layers.quantized import QUANTIZED
from adacomcat.utils.checksum import file_checksum
from adacomcat.utils.files import atomic_folder, require_writable
from adacomcat.utils.model import class_count, evaluating, input_size
from adacomcat.utils.names import ENTRYPOINT
from adacomcat.utils.text import to_json

WEIGHTS = "model.safetensors"

# Entries of timm's pretrained_cfg that say where the weights came from, and not what they need.
_SOURCE_KEYS = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source",
                "architecture", "tag", "custom_load", "label_offset"}
# Arguments of a timm model that a folder leaves to whoever loads it, or writes in its own way.
_RUNTIME_ARGS = {"base", "plan", "plain", "int8", "int4", "device", "dtype", "drop_rate",
                 "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate",
                 "patch_drop_rate"}


def save(model: nn.Module, folder: str | Path, *, architecture: str | None = None,
         model_args: Mapping[str, Any] | None = None, gauge: bool = False) -> None:
    """Write ``model`` to a checkpoint folder; ``load(folder)`` gives it back.

    The model is rebuilt from what is to be written and compared on a random image first.

    A model of transformers is written by its own ``save_pretrained``.

    Args:
        model: a model of timm or transformers, compressed or not.
        folder: absent or empty; it appears when all of it is written.
        architecture: timm's name of the dense model, where the model does not know it itself.
        model_args: the keyword arguments that built the dense model, likewise.
        gauge: leave the redundant numbers out of the file, r² for each factorisation of rank r.
            What is loaded is the same map, its factors rounded once more.

    Raises:
        UserError: the folder holds something or cannot be written, or the description in
            config.json would not give this model back.
    """
    folder = Path(folder)
    require_empty(folder)
    model = unwrap_model(model)
    if is_pretrained(model):
        if gauge:
            raise UserError("folders of transformers keep all factors: save without gauge "
                            "(--gauge)")
        save_pretrained(model, folder)
        return
    require_not_optimized(model, "save")
    _require_no_adapters(model)
    config = describe(model, architecture, model_args)
    weights = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, tensor in model.state_dict().items()}
    if gauge:
        require_not_quantized(model, "gauge")
        weights = without_gauge(model, weights)
    _require_same(model, _rebuilt(config, with_gauge(weights)), config)
    try:
        with atomic_folder(folder, last=CONFIG) as scratch:
            _write(scratch, weights, config)
    except (OSError, SafetensorError) as error:  # the latter where the disk is full
        raise UserError(f"cannot write {folder}: {error}") from error


def _require_no_adapters(model: nn.Module) -> None:
    """Raise a ``UserError`` where a module says that a folder cannot hold it."""
    for name, module in model.named_modules():
        if getattr(module, "apart_from_checkpoints", False):
            raise UserError(f"{name} has adapters, which this folder cannot hold: customize.merge_ "
                            "writes them into the weights, customize.save_adapters into a file")


def _write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = config | {"checksums": {WEIGHTS: file_checksum(folder / WEIGHTS)}}
    (folder / CONFIG).write_text(to_json(config, indent=2) + "\n", encoding="utf-8")
    # safetensors lets nobody else read; the umask has decided for the file that Python made.
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)


def load(folder: str | Path, *, verify: bool = True) -> nn.Module:
    """The model of a folder that ``save``, timm or transformers wrote, on the CPU, in eval mode.

    Args:
        folder: holds model.safetensors and config.json.
        verify: compare the weights with the checksum that ``save`` wrote; a folder of another
            library has none.

    Raises:
        UserError: the folder is absent, damaged, or describes no model that can be built.
    """
    folder = Path(folder)
    if is_pretrained_folder(folder):
        return load_pretrained(folder)
    config = read_config(folder)
    if verify:
        _verify(folder, config.get("checksums"))
    weights = with_gauge(read_weights(folder / WEIGHTS))
    model = build(config, str(folder), weights)
    load_weights_(model, weights, str(folder))
    return model.eval()


def _verify(folder: Path, checksums: object) -> None:
    """Compare files with their checksums in config.json, where it has any."""
    if checksums is None:
        return
    if not isinstance(checksums, dict):
        raise UserError(f"{folder}: the checksums in {CONFIG} are damaged; copy the folder again")
    for name, expected in checksums.items():
        path = folder / Path(name).name
        if path.is_file() and file_checksum(path) != expected:
            raise UserError(f"{path} is not the file that was saved: its checksum differs; copy "
                            "it again, or load it unverified (--no-verify, verify=False) if it "
                            "was changed on purpose")


def require_empty(folder: str | Path, size: int = 0) -> None:
    """Raise a ``UserError`` unless ``folder`` is absent or an empty folder, and can be written.

    What a killed writer left in it counts as nothing.

    Args:
        folder: where ``save`` will write.
        size: bytes that it will write, where they can be estimated.
    """
    folder = Path(folder)
    taken = folder.exists() or folder.is_symlink()
    if folder.is_dir():
        taken = any(not path.name.endswith(".partial") for path in folder.iterdir())
    if taken:
        raise UserError(f"{folder} already holds something; name an absent or empty folder")
    require_writable(folder / CONFIG, size)


def is_checkpoint(folder: str | Path) -> bool:
    """Whether ``folder`` holds what ``save`` writes last."""
    return (Path(folder) / CONFIG).is_file()


def describe(model: nn.Module, architecture: str | None = None,
             model_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of config.json, but for the checksums.

    Raises:
        UserError: the model does not know its architecture, or JSON cannot hold an argument.
    """
    source = dict(getattr(model, "pretrained_cfg", None) or {})
    record = compression_of(model)
    known = record.source or {}
    architecture = architecture or known.get("architecture") or source.get("architecture")
    if architecture is None:
        raise UserError("this model does not know its timm architecture; pass architecture= and "
                        "model_args=. What no timm model is, keep as model.state_dict() and "
                        "model.rank_plan; adacomcat.convert.build_skeleton(dense, plan) takes them")
    if model_args is None:
        # timm writes to _model_args what set_input_size and the like change.
        model_args = {**known.get("model_args", {}), **getattr(model, "_model_args", {})}
    current = _current_args(model)
    args = {k: v for k, v in model_args.items() if k not in _RUNTIME_ARGS | NO_MODEL_ARGS} | current
    ranks = ranks_as_they_are(model)
    quantized = {f"int{bits}": names for bits in QUANTIZED
                 if (names := quantized_layers(model, bits))}
    compressed = {"base": architecture, "plan": ranks, **args, **quantized}
    if is_plain_form(model):
        compressed["plain"] = True
    config = {
        "architecture": ENTRYPOINT if ranks or quantized else architecture,
        "num_classes": class_count(model),
        "num_features": model.num_features,
        "pretrained_cfg": _pretrained_cfg(model, source),
        "model_args": compressed if ranks or quantized else args,
    }
    return _plain(config)


def _current_args(model: nn.Module) -> dict[str, Any]:
    """Arguments that reset_classifier and the like change after a model was built."""
    args: dict[str, Any] = {"num_classes": class_count(model), "in_chans": input_size(model)[0]}
    pool = getattr(model, "global_pool", None)
    if isinstance(pool, str):
        args["global_pool"] = pool
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        args["img_size"] = size
    return args


def _pretrained_cfg(model: nn.Module, source: dict[str, Any]) -> dict[str, Any]:
    """``source`` without where its weights came from, with the model's size and classes."""
    allowed = {field.name for field in fields(PretrainedCfg)} - _SOURCE_KEYS
    kept = {k: v for k, v in source.items() if k in allowed and v is not None}
    return kept | {"input_size": input_size(model), "num_classes": class_count(model)}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` as JSON gives it back.

    Raises:
        UserError: names the argument that JSON cannot hold.
    """
    for name, value in config["model_args"].items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"the model argument {name}={value!r:.60} cannot be written to JSON; "
                            "pass model_args= with timm's name for it") from error
    return json.loads(to_json(config))


def _rebuilt(config: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    model = build(config, "the model to save")
    load_weights_(model, weights, "the model to save, rebuilt from its architecture and "
                                  "model_args (pass them if they are incomplete),")
    return model


@torch.inference_mode()
def _require_same(model: nn.Module, rebuilt: nn.Module, config: dict[str, Any]) -> None:
    """Compare both on one image: pooling and activations are in no state dict.

    Raises:
        UserError: they differ by more than 1% of the largest output, plus 1% of the output.
    """
    parameter = next(model.parameters())
    image = torch.randn(1, *input_size(model), generator=torch.Generator().manual_seed(0))
    image = image.to(parameter.device, parameter.dtype)
    with evaluating(model), evaluating(rebuilt):
        expected = model(image)
        found = rebuilt.to(parameter.device, parameter.dtype)(image)
    largest = expected.nan_to_num(0, 0, 0).abs().max().item()  # a diverged model is saved too
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * largest, equal_nan=True):
        raise UserError(f"{config['model_args'].get('base', config['architecture'])} with "
                        f"{config['model_args']} computes something else than this model; "
                        "pass architecture= and model_args= as it was built")
