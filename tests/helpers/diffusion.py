"""Tiny diffusion models of diffusers' classes; modules that use them skip without diffusers."""

import functools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from adacomcat.customize import adapter_parameters  # noqa: E402

WORDS = ("a", "photo", "of", "sks", "boot", "shoe")


def unet(**settings) -> UNet2DConditionModel:
    """Two levels with attention, 7 blocks, 14 attentions, heads of 8 and 16."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**{
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 24,
        "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2} | settings).eval()


def unet_inputs(dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {"sample": torch.randn(2, 4, 8, 8, dtype=dtype), "timestep": torch.tensor([1, 500]),
            "encoder_hidden_states": torch.randn(2, 5, 24, dtype=dtype)}


def dit():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4,
                                  num_layers=2, sample_size=8, norm_num_groups=8,
                                  num_embeds_ada_norm=10).eval()
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1, 500]),
             "class_labels": torch.tensor([0, 3])}
    return model, given


def sd3(qk_norm=None):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16,
        pooled_projection_dim=20, out_channels=4, pos_embed_max_size=8, qk_norm=qk_norm).eval()
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1, 500]),
             "encoder_hidden_states": torch.randn(2, 5, 24),
             "pooled_projections": torch.randn(2, 20)}
    return model, given


def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8)).eval()
    given = {"hidden_states": torch.randn(2, 16, 4), "timestep": torch.tensor([0.1, 0.5]),
             "encoder_hidden_states": torch.randn(2, 5, 24),
             "pooled_projections": torch.randn(2, 20), "img_ids": torch.zeros(16, 3),
             "txt_ids": torch.zeros(5, 3)}
    given["img_ids"][:, 1] = torch.arange(16) // 4
    return model, given


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """One for all pipelines: its trainer orders words of equal frequency by chance."""
    found = CLIPTokenizer().train_new_from_iterator([" ".join(WORDS)] * 8, vocab_size=300)
    found.model_max_length = 8
    return found


def pipeline(**settings) -> StableDiffusionPipeline:
    """Grey pictures of 16 pixels; the weights are random."""
    words = tokenizer()
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id))
    vae = AutoencoderKL(in_channels=1, out_channels=1, latent_channels=4, sample_size=16,
                        block_out_channels=(8, 8), norm_num_groups=4,
                        down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **settings)
    pipe = StableDiffusionPipeline(vae, text, words, unet(), scheduler, None, None,
                                   requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved_pipeline(folder: Path) -> Path:
    pipeline().save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())
    return folder


def randomise_(model, name: str = "default", std: float = 0.3) -> None:
    """Give every factor of an adapter random numbers."""
    for parameter in adapter_parameters(model, name):
        torch.nn.init.normal_(parameter, std=std)
