"""What run.json says: models before and after, their sites, commands, versions, the machine."""

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adacomcat.checkpoint.folder import WEIGHTS
from adacomcat.convert.quantized import quantized_layers
from adacomcat.convert.record import compression_of, ranks_as_they_are
from adacomcat.cost import model_bytes, model_macs, model_params
from adacomcat.plan import HIDDEN
from adacomcat.sites import DENSE, Filters, Site, altered_layers, find_sites

PACKAGES = ("adacomcat", "torch", "timm", "numpy")
CURVE_POINTS = 24  # of an error curve


def architecture_of(model: nn.Module) -> str:
    """timm's name of the dense model, else its class."""
    source = compression_of(model).source
    config = getattr(model, "pretrained_cfg", None) or {}
    return (source or config).get("architecture") or type(model).__name__


def machine(model: nn.Module) -> dict[str, Any]:
    """Where and in which dtype ``model`` runs, and on how many threads."""
    parameter = next(model.parameters())
    device = parameter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(),
            "dtype": str(parameter.dtype).removeprefix("torch.")}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def run_content(command: str, dense: nn.Module, small: nn.Module, folder: str | Path, *,
                measured: Mapping[str, Mapping[str, float]] | None = None,
                include: Filters | None = None, exclude: Filters | None = None,
                **more: Any) -> dict[str, Any]:
    """The content of run.json.

    Args:
        command: the command line.
        dense: the model before.
        small: the model after, which ``folder`` holds.
        folder: the checkpoint folder.
        measured: model ('dense', 'compressed') → measures beside those that are counted here.
        include, exclude: the filters of the command line.
        more: further entries.
    """
    models = {"dense": _counted(dense), "compressed": _counted(small)}
    weights = Path(folder) / WEIGHTS
    if weights.is_file():
        models["compressed"]["bytes"] = weights.stat().st_size
    kept = {name: models["compressed"][name] / models["dense"][name]
            for name in ("params", "macs", "bytes")}
    for name, values in (measured or {}).items():
        models[name].update(values)
    ranks = ranks_as_they_are(small)
    sites = find_sites(dense, {name.removesuffix(HIDDEN) for name in ranks
                               if name.endswith(HIDDEN)})
    return {"architecture": architecture_of(dense), "command": command,
            "versions": versions(), "machine": machine(small), "models": models, "kept": kept,
            "sites": [_site(site, ranks.get(site.name, DENSE)) for site in sites],
            "left": _left(dense, sites, ranks, include, exclude),
            "curves": _curves(small, sites, ranks),
            "int8_layers": len(quantized_layers(small, 8))} | more


def _counted(model: nn.Module) -> dict[str, float]:
    return {"params": model_params(model), "macs": model_macs(model),
            "bytes": model_bytes(model)}


def _site(site: Site, rank: int | str) -> dict[str, Any]:
    numeric = site.full_rank if rank == DENSE else rank
    return {"site": site.name, "kind": site.kind, "rank": rank, "full_rank": site.full_rank,
            "dense_params": site.dense_params, "params": site.params(rank),  # type: ignore[arg-type]
            "share": int(numeric) / site.full_rank}


def _left(dense: nn.Module, sites: list[Site], ranks: Mapping[str, Any],
          include: Filters | None, exclude: Filters | None) -> list[dict[str, Any]]:
    """What is dense, the parameters that it has, and why."""
    filtered = include is not None or exclude is not None
    wanted = {site.module for site in find_sites(dense, (), include, exclude)}
    rows = []
    for site in sites:
        if ranks.get(site.name, DENSE) == DENSE:
            inside = any(name == site.module or name.startswith(site.module + ".")
                         for name in wanted)
            why = ("left out by a filter" if filtered and not inside else
                   "the plan keeps it dense")
            rows.append({"what": site.name, "params": site.dense_params, "why": why})
    for name in altered_layers(dense):
        size = sum(p.numel() for p in dense.get_submodule(name).parameters())
        rows.append({"what": name, "params": size,
                     "why": "an adapter, a mask, a hook or quantised weights change it"})
    rest = model_params(dense) - sum(site.dense_params for site in sites)
    rows.append({"what": "embeddings, norms, scales and convolutions", "params": rest,
                 "why": "no projection"})
    return rows


def _curves(small: nn.Module, sites: list[Site], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Site → relative error at some ranks, the chosen one among them, where it was measured."""
    known: Mapping[str, Tensor] = compression_of(small).errors or {}
    found = {}
    for site in sites:
        errors = known.get(site.name)
        if errors is None:
            continue
        last = len(errors) - 1
        ranks = {round(last * at / (CURVE_POINTS - 1)) for at in range(CURVE_POINTS)}
        if isinstance(chosen.get(site.name), int):
            ranks.add(chosen[site.name])
        relative = (errors / errors[0].clamp_min(1e-300)).clamp_min(0).sqrt()
        found[site.name] = [{"rank": rank, "share": rank / last, "error": relative[rank].item()}
                            for rank in sorted(ranks)]
    return found
