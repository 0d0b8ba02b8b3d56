"""adacomcat customize: teach a text-to-image model a concept, from a handful of pictures."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from adacomcat import checkpoint
from adacomcat.cli.commands import Outcome
from adacomcat.cli.commands.state import alone, require_fresh
from adacomcat.customize import (
    CustomizeConfig,
    generate,
    open_pipeline,
    picture_grid,
    read_pictures,
    save_adapters,
    train,
)
from adacomcat.errors import UserError, reason
from adacomcat.report.customization import write_customization
from adacomcat.utils.distributed import Processes, start_processes, stop_processes
from adacomcat.utils.files import atomic_file, atomic_folder, make_folder
from adacomcat.utils.launch import was_restarted
from adacomcat.utils.limits import CUSTOMIZATION
from adacomcat.utils.stopping import heeding_signals

FILE = "adapters.safetensors"  # in the output
CLASS, SAMPLES = "class", "samples"  # folders beside the training state
SAMPLED = 4  # pictures in a row of samples
FIELDS = ("instance_prompt", "token", "class_prompt", "init", *CUSTOMIZATION)


def run(args: argparse.Namespace) -> Outcome:
    state = Path(args.state_dir or f"{args.output.rstrip('/')}.state")
    args.resume = args.resume or was_restarted()
    if args.resume and (Path(args.output) / FILE).is_file():
        return Outcome({"output": args.output, "finished": True},
                       lambda: print(f"{args.output} is finished; there is nothing to resume"))
    checkpoint.require_empty(args.output)
    require_fresh(state, args.resume)
    config = _config(args, state)
    with alone(state, args.output), heeding_signals():
        return _trained(args, config, state)


def _config(args: argparse.Namespace, state: Path) -> CustomizeConfig:
    """A flag that is not given leaves the default."""
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    return CustomizeConfig(**given, amp=args.amp, resume=args.resume, state_dir=str(state),
                           gradient_checkpointing=args.gradient_checkpointing).checked()


def _trained(args: argparse.Namespace, config: CustomizeConfig, state: Path) -> Outcome:
    """Train, then write adapters and report, and then remove the state."""
    processes = start_processes(args.device, args.timeout)
    pipe = open_pipeline(args.model, processes.device)
    pictures = read_pictures(pipe, args.instance_images, config.resolution)
    found = train(pipe, pictures, config, class_folder=args.class_images or state / CLASS,
                  targets=args.targets or ("*",), processes=processes,
                  sample=lambda step: _sample(pipe, config, state, step, processes))
    if processes.first:
        _write(args, config, state, pipe, found)
    stop_processes()
    summary = {name: value for name, value in found.items() if name != "losses"}
    summary |= {"output": args.output, "pictures": len(pictures), "loss": found["losses"][-1]}
    return Outcome(summary, lambda: print(
        f"{found['parameters']:,} parameters in {found['attentions']} attentions, "
        f"{config.steps} steps, {found['seconds']:.0f} s; written to {args.output}"))


def _sample(pipe: Any, config: CustomizeConfig, state: Path, step: int,
            processes: Processes) -> None:
    """A row of pictures, from the same noise each time, beside the training state."""
    if not processes.first:
        return
    row = picture_grid(generate(pipe, [config.instance_prompt] * SAMPLED, seed=config.seed),
                       SAMPLED)
    try:
        make_folder(state / SAMPLES)
        with atomic_file(state / SAMPLES / f"step-{step:05d}.png") as scratch:
            row.save(scratch, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write samples to {state}: {reason(error)}") from error


def _write(args: argparse.Namespace, config: CustomizeConfig, state: Path, pipe: Any,
           found: dict[str, Any]) -> None:
    samples = sorted((state / SAMPLES).glob("step-*.png"))
    try:
        with atomic_folder(args.output, last=FILE) as folder:
            save_adapters(pipe, folder / FILE, half=args.half, token=config.token,
                          alpha=config.alpha)
            if not args.no_report:
                facts = {"model": args.model, "prompt": config.instance_prompt,
                         "parameters": f"{found['parameters']:,}", "rank": str(config.rank),
                         "bytes": f"{(folder / FILE).stat().st_size:,}",
                         "seconds of training": f"{found['seconds']:.0f}"}
                write_customization(folder, f"{config.token} beside {args.model}", facts,
                                    found["losses"], samples)
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {reason(error)}; the training state "
                        "stays, and --resume goes on from there") from error
    shutil.rmtree(state, ignore_errors=True)
