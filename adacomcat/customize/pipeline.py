"""diffusers' pipelines: opened, checked for what training needs, and asked for pictures."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from adacomcat.convert.install import build_skeleton
from adacomcat.convert.record import ranks_as_they_are
from adacomcat.customize.adapters import denoiser, processors
from adacomcat.errors import UserError, reason
from adacomcat.plan import RankPlan
from adacomcat.utils.files import atomic_folder
from adacomcat.utils.random import derived_generator

NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
DENOISERS = ("unet", "transformer")
# Files of a pipeline's folder: diffusers' own, and the ranks of a compressed denoiser.
INDEX, WEIGHTS, PLAN = "model_index.json", "diffusion_pytorch_model.safetensors", "rank_plan.json"


def open_pipeline(name: str, device: torch.device) -> Any:
    """The diffusion pipeline of a folder, or of a name on the hub, in single precision.

    Raises:
        UserError: diffusers is not installed, or there is no such pipeline.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise UserError(f"customising needs diffusers ({reason(error)}); "
                        "pip install 'adacomcat[customize]'") from error
    if Path(name).is_dir() and not (Path(name) / INDEX).is_file():
        raise UserError(f"the folder {name} holds no diffusers pipeline: it has no "
                        "model_index.json")
    try:
        with _silent():
            pipe = DiffusionPipeline.from_pretrained(name, **_compressed_parts(Path(name)))
    except UserError:
        raise
    except Exception as error:  # of the file system, the hub, or a class that is not there
        raise UserError(f"cannot open the pipeline {name}: {reason(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    # diffusers reads half precision as single by itself, transformers does not.
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and any(p.dtype != torch.float32 for p in part.parameters()):
            part.float()
    return pipe.to(device)


def save_pipeline(pipe: Any, folder: str | Path) -> None:
    """Write a pipeline whose denoiser is compressed, or is not; ``open_pipeline`` opens it.

    The folder is diffusers', with the plan of ranks beside the denoiser's weights.

    Args:
        pipe: the pipeline, without adapters.
        folder: absent or empty.

    Raises:
        UserError: the model has adapters, beside its projections or merged into them, or the
            folder holds something or cannot be written.
    """
    folder = Path(folder)
    if processors(pipe):
        raise UserError("the pipeline has adapters, which diffusers would not load: save_adapters "
                        "writes them, and unload_ takes them away")
    model = denoiser(pipe)
    ranks = ranks_as_they_are(model)
    _require_described(model, RankPlan(ranks))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already holds something; name an absent or empty folder")
    try:
        with atomic_folder(folder, last=INDEX) as scratch:
            pipe.save_pretrained(scratch)
            for part in DENOISERS:
                if ranks and hasattr(pipe, part):
                    RankPlan(ranks).save(scratch / part / PLAN)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {reason(error)}") from error


def _require_described(model: Any, plan: RankPlan) -> None:
    """What opens the folder builds the denoiser by its config and ranks alone."""
    with torch.device("meta"):
        built = build_skeleton(type(model).from_config(model.config), plan).state_dict()
    weights = model.state_dict()
    for name in sorted(weights.keys() | built.keys()):
        if name not in weights or name not in built or weights[name].shape != built[name].shape:
            raise UserError(f"the denoiser's {name} is not what its config describes, as after "
                            "merge_, so the folder could not be opened again: save_adapters before "
                            "merging, beside the base as it was")


def _compressed_parts(folder: Path) -> dict[str, nn.Module]:
    """The compressed denoiser of a folder that ``save_pipeline`` wrote, where it has one."""
    return {part: _compressed(folder / part) for part in DENOISERS
            if (folder / part / PLAN).is_file()}


def _compressed(folder: Path) -> nn.Module:
    import diffusers
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    kind = getattr(diffusers, name)
    model = build_skeleton(kind.from_config(kind.load_config(folder)), RankPlan.load(folder / PLAN))
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Inside, diffusers and transformers draw no progress bars of their own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging
    drawing = [logging for logging in (diffusers_logging, transformers_logging)
               if logging.is_progress_bar_enabled()]
    for logging in drawing:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in drawing:
            logging.enable_progress_bar()


def require_trainable(pipe: Any) -> None:
    """Raise a ``UserError`` unless ``pipe`` is like Stable Diffusion 1 and 2."""
    lacking = [name for name in NEEDED if getattr(pipe, name, None) is None]
    if lacking or getattr(pipe, "text_encoder_2", None) is not None:
        why = f": it has no {', '.join(lacking)}" if lacking else ""
        raise UserError(f"{type(pipe).__name__} cannot be trained here{why}; give a pipeline with "
                        "one text encoder, an autoencoder and a U-Net, like Stable Diffusion 1 or "
                        "2")


@torch.no_grad()
def generate(pipe: Any, prompts: Sequence[str], *, seed: int = 0, steps: int = 25,
             guidance: float = 7.5, batch: int = 4) -> list[Image.Image]:
    """A picture for each prompt; its noise depends on the seed and its place in the list alone.

    Args:
        pipe: the pipeline, with or without adapters.
        prompts: the words.
        seed: of the noise.
        steps: of denoising.
        guidance: the scale of classifier-free guidance; 1 is none.
        batch: pictures that are made together.
    """
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        words = list(prompts[start:start + batch])
        noise = [derived_generator(seed, start + at) for at in range(len(words))]
        pictures += pipe(words, num_inference_steps=steps, guidance_scale=guidance,
                         generator=noise).images
    return pictures


def picture_grid(pictures: Sequence[Image.Image], columns: int, scale: int = 1) -> Image.Image:
    """The pictures side by side in rows, each ``scale`` times as large; white where none is."""
    width, height = pictures[0].width * scale, pictures[0].height * scale
    grid = Image.new(pictures[0].mode, (columns * width, -(-len(pictures) // columns) * height),
                     "white")
    for at, picture in enumerate(pictures):
        large = picture.resize((width, height), Image.Resampling.NEAREST)
        grid.paste(large, (at % columns * width, at // columns * height))
    return grid


def resolution_of(pipe: Any) -> int:
    """The side of the pictures that a pipeline makes, in pixels."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """What the U-Net reads of a prompt: (1, L, width)."""
    words = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt",
                           max_length=pipe.tokenizer.model_max_length)
    return pipe.text_encoder(words.input_ids.to(pipe.device))[0]


@torch.no_grad()
def encode_pictures(pipe: Any, pictures: Tensor, batch: int = 4) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents (N, C, H, W), as the U-Net sees them.

    Args:
        pipe: whose autoencoder encodes.
        pictures: (N, channels, H, W) from -1 to 1.
        batch: pictures that are encoded together.
    """
    found = [pipe.vae.encode(part.to(pipe.device)).latent_dist for part in pictures.split(batch)]
    scale = pipe.vae.config.scaling_factor
    return (scale * torch.cat([part.mean for part in found]),
            scale * torch.cat([part.std for part in found]))
