"""adacomcat inspect: the sites of a model, their ranks, and the error of truncation there."""

import argparse
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from adacomcat import cost
from adacomcat.allocation.deployment import WIDTHS, fuses
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.convert.calibrate import calibrate, calibration_batches
from adacomcat.convert.factors import error_curves, require_finite_model
from adacomcat.convert.quantized import quantized_layers
from adacomcat.errors import UserError
from adacomcat.evaluation.sensitivity import sensitivity
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.quantized import QUANTIZED
from adacomcat.layers.registry import attention_parts, attention_tier
from adacomcat.layers.stock import LinearPair, PlainAttention
from adacomcat.report.page import add_to_page
from adacomcat.report.tables import bar, print_table
from adacomcat.sites import Site, find_sites, prunable_mlps

# Errors are shown at these shares of the break-even rank, at which factors save nothing.
PARTS = (0.125, 0.25, 0.5, 0.75)


def run(args: argparse.Namespace) -> Outcome:
    _require_images(args)
    outline = None if _sees_images(args) else inputs.outline(args)
    model = inputs.model(args).to(inputs.device(args)) if outline is None else outline
    sites = find_sites(model, include=args.include, exclude=args.exclude)
    images, curves = _judged(args, model) if outline is None else (None, {})
    rows = [_row(site, curves.get(site.name)) for site in sites]
    data = {
        "model": args.model, "params": cost.model_params(model), "macs": _macs(model),
        "bytes": cost.model_bytes(model), "low_rank_modules": _low_rank(model),
        **{f"int{bits}_layers": len(quantized_layers(model, bits)) for bits in QUANTIZED},
        "sites": rows,
        "attentions": _attentions(model),
    }
    if args.sensitivity:
        assert images is not None  # _require_images
        found = sensitivity(model, calibration_batches(images, model), _decisions(args, model),
                            args.ranks)
        data["sensitivity"] = found
        if args.record is not None:
            add_to_page(args.record, "sensitivity", {
                "model": args.model, "params": data["params"],
                "command": args.invocation} | found)
    return Outcome(data, lambda: _show(data))


def _require_images(args: argparse.Namespace) -> None:
    """--images is another name of --calibration-dir here."""
    args.calibration_dir = args.calibration_dir or args.images
    if args.record is not None and not args.sensitivity:
        raise UserError("inspect --record writes what --sensitivity measures; pass both")
    if args.sensitivity and args.calibration_dir is None and not (
            args.data is not None and args.calibration_images):
        raise UserError("--sensitivity judges by images: pass --images FOLDER, or --data with "
                        "--calibration-images")


def _sees_images(args: argparse.Namespace) -> bool:
    return args.calibration_dir is not None or args.data is not None


def _judged(args: argparse.Namespace, model: nn.Module
            ) -> tuple[Tensor | None, Mapping[str, Tensor]]:
    """(images, site → error of each rank)"""
    require_finite_model(model)
    images = inputs.calibration(args, inputs.pictures(args, model))
    return images, error_curves(model, {} if images is None else calibrate(model, images))


def _macs(model: nn.Module) -> int | None:
    """Multiply-accumulates of an image; None where an outline would have to look at numbers."""
    try:
        return cost.model_macs(model)
    except Exception as error:  # whatever a model stumbles over that reads its numbers
        if next(model.parameters()).is_meta and "meta" in str(error):
            return None
        raise


def _decisions(args: argparse.Namespace, model: nn.Module) -> list[Site]:
    """The sites of ``compress`` with images: MLPs lose neurons where they can."""
    sites = find_sites(model, prunable_mlps(model), args.include, args.exclude)
    if not sites:
        raise UserError("no site: nothing in this model can be made low-rank")
    return sites


def _row(site: Site, errors: Tensor | None) -> dict[str, Any]:
    """``errors``: of each rank; None where there are no weights."""
    ranks = [max(1, int(part * site.break_even)) for part in PARTS]
    return {
        "site": site.name, "tier": site.tier, "kind": site.kind, "in": site.in_features,
        "out": site.out_features, "heads": site.num_heads, "full_rank": site.full_rank,
        "break_even": round(site.break_even, 1), "params": site.dense_params,
        "errors": {} if errors is None else {
            rank: (errors[rank] / errors[0].clamp_min(1e-300)).sqrt().item() for rank in ranks},
    }


def _low_rank(model: nn.Module) -> int:
    return sum(isinstance(module, LowRankLinear | LinearPair) or hasattr(module, "rank_vo")
               for module in model.modules())


def _attentions(model: nn.Module) -> list[dict[str, Any]]:
    """Each attention that is known: its ranks per head, and whose fused kernels take them."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LowRankAttention | PlainAttention):
            ranks = module.rank_qk, module.rank_vo
        elif attention_tier(module, model) is not None:
            ranks = (attention_parts(module).head_dim,) * 2
        else:
            continue
        found.append({"attention": name, "rank_qk": ranks[0], "rank_vo": ranks[1],
                      **{runtime: fuses(runtime, *ranks) for runtime in WIDTHS}})
    return found


def _show(data: dict[str, Any]) -> None:
    if "sensitivity" in data:
        _show_sensitivity(data)
        return
    columns = ["site", "tier", "in → out", "full rank", "break-even", "parameters"]
    judged = any(row["errors"] for row in data["sites"])
    if judged:
        columns += [f"error at {part:g}" for part in PARTS]
    rows = []
    for row in data["sites"]:
        heads = f" × {row['heads']}" if row["kind"] in ("qk", "vo") else ""
        rows.append([row["site"], row["tier"], f"{row['in']} → {row['out']}",
                     f"{row['full_rank']}{heads}", f"{row['break_even']:g}{heads}",
                     f"{row['params']:,}",
                     *(f"{error:.3f}" for error in row["errors"].values())])
    macs = "" if data["macs"] is None else f", {data['macs'] / 1e6:,.1f} MMACs"
    print_table(f"{data['model']}: {data['params']:,} parameters{macs}", columns, rows)
    if judged:
        print("error at 0.5: relative error that truncation to half of the break-even rank leaves")
    if data["low_rank_modules"]:
        print_table("fused attention of other runtimes",
                    ["attention", "rank qk", "rank vo", *WIDTHS],
                    [[row["attention"], row["rank_qk"], row["rank_vo"],
                      *("yes" if row[runtime] else "no" for runtime in WIDTHS)]
                     for row in data["attentions"]])
        print(f"{data['low_rank_modules']} modules are low-rank already")
    for bits in QUANTIZED:
        if count := data[f"int{bits}_layers"]:
            print(f"{count} layers are on int{bits}: {data['bytes']:,} bytes of weights in all")
    if not data["sites"] and not data["low_rank_modules"]:
        print("no site: nothing in this model can be made low-rank")


def _show_sensitivity(data: dict[str, Any]) -> None:
    found = data["sensitivity"]
    most = max(max(row["damage"].values(), default=0.0) for row in found["sites"])
    rows = [[row["site"], f"{row['full_rank']}",
             "  ".join(f"{rank}: {damage:.4f}" for rank, damage in row["damage"].items()),
             bar(max(row["damage"].values(), default=0.0), most),
             "–" if row["first_cut"] is None else f"{row['first_cut']:.2f}"]
            for row in found["sites"]]
    print_table(f"{data['model']}: damage of each rank alone, on {found['judging']} images",
                ["site", "full rank", "rank: damage", "", "cut below"], rows)
    blocks = sorted(found["blocks"].items(), key=lambda entry: -entry[1])
    worst = max(found["blocks"].values(), default=0.0)
    print_table("blocks, the most sensitive first", ["block", "damage", ""],
                [[name, f"{damage:.4f}", bar(damage, worst)] for name, damage in blocks])
    print("damage: relative squared change of final tokens and outputs, the other sites dense; "
          "cut below: the share of parameters kept at which the allocation begins with a site")
