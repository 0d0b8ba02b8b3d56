"""adacomcat status: where a training run stands, seen from outside; what a finished one gave."""

import argparse
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from adacomcat import checkpoint
from adacomcat.cli.commands import Outcome
from adacomcat.cli.commands.state import LOCK, METRICS
from adacomcat.distill.metrics import read_events
from adacomcat.errors import UserError
from adacomcat.report.files import recorded
from adacomcat.report.live import pace
from adacomcat.report.summary import print_summary
from adacomcat.report.tables import print_facts, print_table
from adacomcat.utils.files import is_locked

LAST = 5  # epochs that are shown


def run(args: argparse.Namespace) -> Outcome:
    state = Path(args.state_dir or _state_of(args.folder))
    if (state / METRICS).is_file():
        found = _running(state)
        return Outcome(found, lambda: _show(args.folder, found))
    if not (checkpoint.is_checkpoint(args.folder) or (Path(args.folder) / "pareto.json").is_file()):
        raise UserError(f"there is no run: neither {args.folder} nor {state} holds one")
    return Outcome({"state": "finished"} | recorded(args.folder),
                   lambda: print_summary(args.folder))


def _state_of(folder: str) -> str:
    folder = folder.rstrip("/")
    return folder if folder.endswith(".state") else f"{folder}.state"


def _running(state: Path) -> dict[str, Any]:
    events = read_events(state / METRICS)
    found: dict[str, Any] = {"state": "running" if is_locked(state / LOCK) else "stopped"}
    for name in ("start", "step", "search"):
        of_kind = [event for event in events if event["event"] == name]
        if of_kind:
            found[name] = of_kind[-1]
    epochs = {event["epoch"]: event for event in events if event["event"] == "epoch"}
    return found | {"epochs": list(epochs.values()),
                    "age_seconds": time.time() - events[-1]["time"] if events else None}


def _show(folder: str, found: dict[str, Any]) -> None:
    facts = {"state": found["state"]}
    if found["age_seconds"] is not None:
        facts["last sign of life"] = f"{timedelta(seconds=round(found['age_seconds']))} ago"
    if "step" in found:
        step, start = found["step"], found.get("start", {})
        facts["epoch"] = f"{step['epoch']} of {start.get('epochs', '?')}"
        facts["step"] = f"{step['step']} of {start.get('steps', '?')}"
        facts["pace"] = pace(step)
    if "search" in found:
        search = found["search"]
        facts["last search"] = (f"epoch {search['epoch']}, {search['changed']} ranks changed, "
                                f"{search['params']:,} parameters")
    print_facts(folder, facts)
    if found["epochs"]:
        print_table("last epochs", ["epoch", "loss", "top-1 %", "seconds"], [
            [row["epoch"], f"{row['loss']:.4f}", f"{row['top1']:.2f}" if "top1" in row else "",
             f"{row['train_seconds'] + row['search_seconds']:.0f}"]
            for row in found["epochs"][-LAST:]])
    if found["state"] == "stopped":
        print("nobody works on it; train --resume goes on")
