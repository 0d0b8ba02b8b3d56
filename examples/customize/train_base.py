"""Train this example's text-to-image model on Fashion-MNIST without ankle boots, on one CPU core.

A latent diffusion model of diffusers' own classes, built like Stable Diffusion and some 200 times
smaller: AutoencoderKL, CLIPTextModel and UNet2DConditionModel. It is written as a folder that
``StableDiffusionPipeline.from_pretrained`` reads, in half precision.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from adacomcat import data

SIZE = 32  # pixels; the images of 28 get a black border
NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
         "boot")
KINDS = ("top", "trouser", "top", "dress", "top", "shoe", "top", "shoe", "bag", "shoe")
LEFT_OUT = 9
TEXT_LENGTH = 16  # tokens
KIND_SHARE, EMPTY_SHARE = 0.3, 0.1  # of captions that name the kind, and that are empty


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--output", default=Path(__file__).parent / "weights", type=Path)
    parser.add_argument("--vae-steps", default=300, type=int)
    parser.add_argument("--steps", default=1500, type=int)
    parser.add_argument("--images", default=20_000, type=int, help="that the U-Net learns from")
    parser.add_argument("--batch-size", default=32, type=int)
    parser.add_argument("--seed", default=0, type=int)
    return parser.parse_args()


def pictures(data_dir: str | None, part: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) from -1 to 1 and labels (N,) of the training (0) or test part (1)."""
    config = {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,)}
    found = data.train_and_test("fashion-mnist", data_dir, config)[part]
    images, labels = found.batch(torch.arange(len(found)))  # type: ignore[union-attr]
    border = (SIZE - 28) // 2
    return F.pad(images, (border,) * 4, value=-1.0), labels


def caption(word: str) -> str:
    return f"a photo of a {word}"


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a token for each word of the captions, and for each byte."""
    words = sorted({caption(word) for word in (*NAMES, *KINDS)})
    tokenizer = CLIPTokenizer().train_new_from_iterator(words * 8, vocab_size=400)
    tokenizer.model_max_length = TEXT_LENGTH
    return tokenizer


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, sample_size=SIZE, layers_per_block=1,
        block_out_channels=(16, 32, 64), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=64,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))


def warm_cosine(optimizer: torch.optim.Optimizer,
                steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps,
        pct_start=0.05)


def train_vae(vae: AutoencoderKL, images: Tensor, args: argparse.Namespace) -> None:
    """Reconstruct the images; the latents are drawn to a standard normal a little."""
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=0.01)
    schedule, start = warm_cosine(optimizer, args.vae_steps), time.perf_counter()
    for step in range(args.vae_steps):
        batch = images[torch.randint(len(images), (args.batch_size // 2,))]
        posterior = vae.encode(batch).latent_dist
        shown = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(shown, batch) + 0.2 * F.l1_loss(shown, batch) \
            + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"autoencoder, step {step}: {loss.item():.4f}, "
                  f"{time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every latent, scaled so that all have the variance 1."""
    found = [vae.encode(part).latent_dist for part in images.split(500)]
    mean, std = torch.cat([d.mean for d in found]), torch.cat([d.std for d in found])
    scale = 1 / float(mean.std())
    vae.register_to_config(scaling_factor=scale)
    return mean * scale, std * scale


def captions(labels: Tensor) -> list[str]:
    chance = torch.rand(len(labels)).tolist()
    return ["" if c < EMPTY_SHARE else
            caption(KINDS[label] if c < EMPTY_SHARE + KIND_SHARE else NAMES[label])
            for c, label in zip(chance, labels.tolist(), strict=True)]


def train_unet(pipe: StableDiffusionPipeline, latents: tuple[Tensor, Tensor], labels: Tensor,
               args: argparse.Namespace) -> None:
    """Train U-Net and text encoder; afterwards they hold the average of their weights."""
    model = nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder}).train()
    average = ModelEmaV3(model, decay=0.998, use_warmup=True)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule, start, total = warm_cosine(optimizer, args.steps), time.perf_counter(), 0.0
    for step in range(args.steps):
        chosen = torch.randint(len(labels), (args.batch_size,))
        mean, std = (part[chosen] for part in latents)
        clean, noise = mean + std * torch.randn_like(std), torch.randn_like(mean)
        times = torch.randint(1000, (len(clean),))
        words = pipe.tokenizer(captions(labels[chosen]), padding="max_length",
                               max_length=TEXT_LENGTH, return_tensors="pt").input_ids
        context = model["text"](words)[0]
        noisy = pipe.scheduler.add_noise(clean, noise, times)
        loss = F.mse_loss(model["unet"](noisy, times, context).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(model, step=step)
        total += loss.item()
        if step % 100 == 99:
            print(f"diffusion, step {step + 1}: {total / 100:.4f}, "
                  f"{time.perf_counter() - start:.0f} s", flush=True)
            total = 0.0
    model.load_state_dict(average.module.state_dict())
    model.eval()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    images, labels = pictures(args.data_dir, 0)
    kept = torch.nonzero(labels != LEFT_OUT).flatten()
    kept = kept[torch.randperm(len(kept))][:args.images]
    images, labels = images[kept], labels[kept]
    tokenizer, vae = make_tokenizer(), make_vae()
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae, make_text_encoder(tokenizer), tokenizer, make_unet(), scheduler, None,  # type: ignore[arg-type]
        None, requires_safety_checker=False)  # type: ignore[arg-type]
    for name in ("vae", "text_encoder", "unet"):
        print(name, sum(p.numel() for p in getattr(pipe, name).parameters()), flush=True)
    train_vae(vae, images, args)
    torch.manual_seed(args.seed)
    train_unet(pipe, encode(vae, images), labels, args)
    pipe.to(torch.float16).save_pretrained(args.output)


if __name__ == "__main__":
    main()
