"""The pictures that a model is customised with: the given ones, and those of their class."""

from pathlib import Path
from typing import Any

from torch import Tensor

from adacomcat import data
from adacomcat.customize.config import CustomizeConfig
from adacomcat.customize.pipeline import generate, resolution_of
from adacomcat.data.folder import picture_files
from adacomcat.errors import UserError
from adacomcat.utils.files import atomic_file, make_folder
from adacomcat.utils.progress import progress


def read_pictures(pipe: Any, folder: str | Path, resolution: int | None = None) -> Tensor:
    """Every picture under a folder, cropped to a square: (N, channels, side, side), -1 to 1.

    Raises:
        UserError: there is no picture, or one cannot be read.
    """
    side, channels = resolution or resolution_of(pipe), pipe.vae.config.in_channels
    half = (0.5,) * channels
    return data.image_tensor_files(folder, {
        "input_size": (channels, side, side), "mean": half, "std": half, "crop_pct": 1.0})


def class_pictures(pipe: Any, folder: str | Path, config: CustomizeConfig) -> Tensor:
    """Pictures of the class prompt, as ``read_pictures`` gives them.

    Where the folder has fewer than ``config.num_class_images``, the pipeline makes the others,
    before it has adapters, and they stay there.

    Raises:
        UserError: the folder cannot be written.
    """
    folder, wanted = Path(folder), config.num_class_images
    assert config.class_prompt is not None
    try:
        make_folder(folder)
        there = len(picture_files(folder))
        for at in progress(range(there, wanted), "pictures of the class", total=wanted - there):
            # One by one, so that a run which stops here goes on with the same pictures.
            picture = generate(pipe, [config.class_prompt], seed=config.seed + 1 + at)[0]
            with atomic_file(folder / f"{at:04d}.png") as scratch:
                picture.save(scratch, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write pictures of the class to {folder}: "
                        f"{error.strerror or error}") from error
    return read_pictures(pipe, folder, config.resolution)[:wanted]
