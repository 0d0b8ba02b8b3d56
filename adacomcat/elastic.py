"""One folder, every size: the dense model, its nested factors, and named sizes that were refitted.

    config.json, model.safetensors   the dense model, as ``checkpoint.save`` writes it
    nested.safetensors               a calibration without images, from which any size is cut
    refit-0.5.safetensors            what the model that keeps 0.5 has in place of dense weights,
                                     with its plan; one file for each named size
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from adacomcat import checkpoint
from adacomcat.calibration import Calibration
from adacomcat.compression import compress, compress_
from adacomcat.convert.install import build_skeleton
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.utils.checksum import file_checksum
from adacomcat.utils.files import atomic_folder
from adacomcat.utils.limits import FRACTION
from adacomcat.utils.model import unwrapped
from adacomcat.utils.text import to_json

NESTED, REFIT = "nested.safetensors", "refit-{:g}.safetensors"


def save_elastic(model: nn.Module, folder: str | Path, calibration: Calibration,
                 keeps: Sequence[float] = ()) -> None:
    """Write a folder from which ``load(folder, keep_params=…)`` cuts a model of any size.

    Args:
        model: the dense timm model that was calibrated.
        folder: absent or empty; it appears when all of it is written.
        calibration: what ``calibrate`` made of ``model``.
        keeps: named sizes, fractions of the parameters. Each is compressed for itself, and fitted
            to the images where ``calibration`` kept them; ``load`` gives exactly this model.

    Raises:
        UserError: a fraction is out of range or out of reach, the calibration is of another
            model, or the folder holds something or cannot be written.
    """
    folder, model = Path(folder), unwrapped(model)
    checkpoint.require_empty(folder)
    for keep in keeps:
        if not FRACTION.holds(keep):
            raise UserError(f"the sizes of an elastic folder must be {FRACTION}; got {keep!r:.40}")
    try:
        with atomic_folder(folder, last=checkpoint.CONFIG) as scratch:
            checkpoint.save(model, scratch)
            bare = Calibration(calibration.weights, calibration.known)
            bare.save(scratch / NESTED)
            for keep in keeps:
                small = compress(model, keep_params=keep, calibration=calibration)
                _write_refit(scratch / REFIT.format(keep), small, model)
            _add_checksums(scratch)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def load(folder: str | Path, *, verify: bool = True, keep_params: float | None = None,
         keep_macs: float | None = None, max_latency_ms: float | None = None) -> nn.Module:
    """The model of a checkpoint folder that ``save`` or timm wrote, on the CPU, in eval mode.

    Of a folder that ``save_elastic`` wrote, any size: a named one as it was fitted, another one cut
    from the nested factors. Without a budget it is the dense model.

    Args:
        folder: holds model.safetensors and config.json.
        verify: compare the files with the checksums that were written; a folder of timm's has
            none.
        keep_params: the fraction of the parameters to keep.
        keep_macs: the fraction of the multiply-accumulates to keep.
        max_latency_ms: milliseconds of one forward pass, as for ``compress``.

    Raises:
        UserError: the folder is absent, damaged, or describes no model that can be built; a budget
            is given and the folder has one size, or none as small.
    """
    folder, budgets = Path(folder), (keep_params, keep_macs, max_latency_ms)
    model = checkpoint.load(folder, verify=verify)
    if budgets == (None, None, None):
        return model
    if not (folder / NESTED).is_file():
        raise UserError(f"{folder} holds one model of one size; compress --elastic and "
                        "adacomcat.save_elastic write folders of every size")
    named = None if keep_params is None else folder / REFIT.format(keep_params)
    if named is not None and named.is_file() and budgets[1:] == (None, None):
        return _read_refit(named, model)
    return compress_(model, keep_params=keep_params, keep_macs=keep_macs,
                     max_latency_ms=max_latency_ms, calibration=Calibration.load(folder / NESTED))


def _write_refit(path: Path, small: nn.Module, dense: nn.Module) -> None:
    """What ``small`` has and ``dense`` has not."""
    known = dense.state_dict()
    found = {name: tensor.detach().cpu().contiguous().clone()
             for name, tensor in small.state_dict().items()
             if name not in known or not _equal(known[name], tensor)}
    plan: RankPlan = small.rank_plan  # type: ignore[assignment]
    save_file(found, path, metadata={"plan": plan.to_json()})


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _read_refit(path: Path, model: nn.Module) -> nn.Module:
    """``model`` in the shapes of the plan, with the weights of the file."""
    try:
        with safe_open(path, framework="pt") as file:
            plan = RankPlan.from_json((file.metadata() or {})["plan"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        dense = model.state_dict()
        build_skeleton(model, plan)
        missing = {name: dense[name] for name in model.state_dict() if name not in found}
        model.load_state_dict({**missing, **found})
    except (OSError, SafetensorError, KeyError, RuntimeError, UserError) as error:
        raise UserError(f"the refit {path} is damaged; copy the folder again") from error
    return model.eval()


def _add_checksums(folder: Path) -> None:
    """Into config.json, of all files beside it."""
    path = folder / checkpoint.CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    for file in sorted(folder.glob("*.safetensors")):
        config["checksums"][file.name] = file_checksum(file)
        file.chmod(path.stat().st_mode)
    path.write_text(to_json(config, indent=2) + "\n", encoding="utf-8")
