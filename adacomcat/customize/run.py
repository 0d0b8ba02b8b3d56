"""One customisation: the pictures of the class, adapters, training, and what was measured."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from adacomcat.customize.adapters import DEFAULT, adapters_of, add_adapters, parameter_count
from adacomcat.customize.config import CustomizeConfig
from adacomcat.customize.files import base_checksum
from adacomcat.customize.pictures import class_pictures
from adacomcat.customize.pipeline import require_trainable
from adacomcat.customize.trainer import CustomizeTrainer
from adacomcat.distill.state import has_state, load_state
from adacomcat.errors import UserError
from adacomcat.utils.checksum import checksum
from adacomcat.utils.distributed import Processes


def train(pipe: Any, pictures: Tensor, config: CustomizeConfig, *,
          class_folder: str | Path | None = None, targets: Sequence[str] = ("*",),
          processes: Processes | None = None,
          sample: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Put an adapter beside the attentions of a pipeline, in place, and train it.

    Args:
        pipe: a diffusers pipeline like Stable Diffusion 1 or 2, without adapters.
        pictures: what it shall learn, as ``read_pictures`` gives them.
        config: all settings.
        class_folder: of pictures of the class; those that are missing are made and stay there.
        targets: globs that name attentions.
        processes: the processes that train together.
        sample: called with the number of steps done, after each ``config.sample_steps``.

    Returns:
        'losses' of all steps, 'seconds' of training, 'attentions' and 'parameters'.

    Raises:
        UserError: settings, pictures or the pipeline do not fit, or the loss diverges.
        Stopped: a signal asked for it; the state is saved.
    """
    config = config.checked()
    processes = processes or Processes(device=pipe.device)
    require_trainable(pipe)
    if config.resume and config.state_dir is None:
        raise UserError("resume needs the folder of a training state")
    inputs = {"model": base_checksum(pipe), "pictures": checksum(pictures)}
    known = None
    if config.class_prompt is not None:
        known = _class_pictures(pipe, class_folder, config, processes)
        inputs["class pictures"] = checksum(known)
    places = add_adapters(pipe, config.rank, targets, init=config.init, seed=config.seed)
    factors = {f"{place}.{name}": factor for place, adapter in adapters_of(pipe).items()
               for name, factor in adapter.named_parameters()}
    trainer = CustomizeTrainer(pipe, config, pictures, factors, class_pictures=known,
                               processes=processes, inputs=inputs)
    if config.resume and has_state(str(config.state_dir)):
        trainer.load_state_dict(load_state(str(config.state_dir)))
    trainer.train(sample)
    return {"losses": trainer.losses, "seconds": trainer.seconds, "attentions": len(places),
            "parameters": parameter_count(pipe, DEFAULT)}


def _class_pictures(pipe: Any, folder: str | Path | None, config: CustomizeConfig,
                    processes: Processes) -> Tensor:
    """The pictures of the class, which the first process makes."""
    if folder is None:
        raise UserError("a class prompt needs a folder for pictures of the class (class_folder)")
    if processes.first:
        class_pictures(pipe, folder, config)
    processes.barrier()
    return class_pictures(pipe, folder, config)
