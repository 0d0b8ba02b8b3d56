"""Models of every library that has a door, tried at every step: the table of docs/families.md.

    python tools/doors.py          # figures: relative differences, parameters kept
    python tools/generate_docs.py doors

The models are small, their weights random, biases and norms not trivial.
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import adacomcat
from adacomcat.convert import build_skeleton
from adacomcat.layers.fused import (
    FusedAttention,
    FusedDenseMlp,
    FusedGatedMlp,
    FusedMlp,
    FusedRotaryAttention,
)
from adacomcat.utils.inputs import Batch, Inputs
from adacomcat.utils.model import tokens_and_outputs

KEEP = 0.6
SAME, FUSED = 1e-5, 1e-4  # relative differences that are allowed in float32
VIT = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
       "patch_size": 8, "intermediate_size": 384}


class Door(NamedTuple):
    """A model with what it takes, and how it is stored."""

    library: str
    build: Callable[[], Any]
    inputs: Callable[[], Inputs]
    store: str = "state_dict and plan"


class Outcome(NamedTuple):
    """What came of one door. Differences are relative, on the inputs that calibrate."""

    kinds: set[str]
    full_rank: float
    kept: Mapping[str, float]  # of the parameters: 'data-free', 'calibrated'
    errors: Mapping[str, float]
    fused: list[str]
    fused_error: float
    same_when_loaded: bool


def pictures(count: int = 24, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size)


def _timm(name: str, **arguments: Any) -> Callable[[], Any]:
    def build() -> Any:
        import timm

        return timm.create_model(name, **arguments)
    return build


def _pretrained(name: str, config: str, **values: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**values))
    return build


def _torchvision(name: str, *arguments: Any, **values: Any) -> Callable[[], Any]:
    def build() -> Any:
        from torchvision import models

        return getattr(models, name)(*arguments, **values)
    return build


def _open_clip() -> Any:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_vision_tower

    assert CLIPTextCfg
    return _build_vision_tower(32, CLIPVisionCfg(layers=2, width=96, head_width=32, patch_size=8,
                                                 image_size=32))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(96, 3, 384, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _attention_inputs() -> Batch:
    x = torch.randn(24, 16, 96) * torch.logspace(0, -2, 96)
    return Batch((x, x, x))


TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3,
        "num_classes": 5}
_TIMM, _HF = "adacomcat.save", "save_pretrained"


def _hf(name: str, config: str, **values: Any) -> Door:
    return Door("transformers", _pretrained(name, config, **(VIT | values)),
                lambda: Batch((), {"pixel_values": pictures()}), _HF)


DOORS: Mapping[str, Door] = {
    "ViT": Door("timm", _timm("vit_tiny_patch16_224", **TINY), pictures, _TIMM),
    "ViT, features_only": Door("timm", _timm(
        "vit_tiny_patch16_224", features_only=True, out_indices=(0, 1),
        **{name: value for name, value in TINY.items() if name != "num_classes"}), pictures),
    "EVA-02": Door("timm", _timm("eva02_tiny_patch14_224", **TINY), pictures, _TIMM),
    "DINOv3": Door("timm", _timm("vit_small_patch16_dinov3", **(TINY | {"num_classes": 0})),
                   pictures, _TIMM),
    "BEiT": Door("timm", _timm("beit_base_patch16_224", **TINY), pictures, _TIMM),
    "Swin": Door("timm", _timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=32,
                               depths=(1, 1), num_heads=(2, 2), num_classes=5),
                 lambda: pictures(size=56), _TIMM),
    "ViTForImageClassification": _hf("ViTForImageClassification", "ViT"),
    "DeiTModel": _hf("DeiTModel", "DeiT"),
    "Dinov2Model": _hf("Dinov2Model", "Dinov2"),
    "Dinov2WithRegistersModel": _hf("Dinov2WithRegistersModel", "Dinov2WithRegisters"),
    "Dinov2Model, SwiGLU": _hf("Dinov2Model", "Dinov2", use_swiglu_ffn=True),
    "DINOv3ViTModel": _hf("DINOv3ViTModel", "DINOv3ViT"),
    "CLIPVisionModel": _hf("CLIPVisionModel", "CLIPVision"),
    "SiglipVisionModel": _hf("SiglipVisionModel", "SiglipVision"),
    "SwinModel": Door("transformers", _pretrained(
        "SwinModel", "Swin", image_size=32, patch_size=2, embed_dim=48, depths=[2, 1],
        num_heads=[2, 4], window_size=4, drop_path_rate=0.0),
        lambda: Batch((), {"pixel_values": pictures()}), _HF),
    "VisionTransformer": Door("torchvision", _torchvision(
        "VisionTransformer", 32, 8, 2, 3, 96, 384, num_classes=5), pictures),
    "SwinTransformer": Door("torchvision", _torchvision(
        "SwinTransformer", [2, 2], 48, [2, 1], [2, 4], [4, 4], num_classes=5,
        stochastic_depth_prob=0.0), pictures),
    "vision tower": Door("open_clip", _open_clip, pictures),
    "nn.TransformerEncoder": Door("PyTorch", _encoder, lambda: torch.randn(24, 16, 96)),
    "nn.MultiheadAttention": Door("PyTorch", lambda: nn.MultiheadAttention(
        96, 3, batch_first=True), _attention_inputs),
    "nn.Linear": Door("PyTorch", lambda: nn.Linear(96, 96),
                      lambda: torch.randn(400, 96) * torch.logspace(0, -2, 96)),
}
HEADER = ("library", "model", "sites", "full rank", "data-free", "calibrated", "`optimize` fuses",
          "stored by")


def built(name: str) -> Any:
    torch.manual_seed(0)
    model = DOORS[name].build()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def tried(name: str) -> Outcome:
    """One door, every step."""
    door, dense = DOORS[name], built(name)
    inputs = door.inputs()
    expected = tokens_and_outputs(dense, inputs)

    def error(model: nn.Module) -> float:
        return _difference(tokens_and_outputs(model, inputs), expected)

    whole = adacomcat.compress(dense, plan=adacomcat.RankPlan.full(dense))
    given = [inputs.args] if isinstance(inputs, Batch) and inputs.args else (
        inputs.kwargs if isinstance(inputs, Batch) else inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights see few images
        made = {"data-free": adacomcat.compress(dense, keep_params=KEEP),
                "calibrated": adacomcat.compress(dense, keep_params=KEEP, calibration=given)}
    fused = adacomcat.optimize(made["calibrated"])
    return Outcome(
        {site.kind for plan in (adacomcat.find_sites(dense),
                                adacomcat.find_sites(dense, adacomcat.sites.prunable_mlps(dense)))
         for site in plan},
        error(whole), {way: _size(model) / _size(dense) for way, model in made.items()},
        {way: error(model) for way, model in made.items()},
        [part for part, kinds in (("attention", FusedAttention | FusedRotaryAttention),
                                  ("MLP", FusedMlp | FusedDenseMlp | FusedGatedMlp))
         if any(isinstance(module, kinds) for module in fused.modules())],
        _difference(tokens_and_outputs(fused, inputs),
                    tokens_and_outputs(made["calibrated"], inputs)),
        _same_when_loaded(name, made["calibrated"], inputs))


def _same_when_loaded(name: str, model: Any, inputs: Inputs) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if DOORS[name].store == _TIMM:
            adacomcat.save(model, folder)
            loaded = adacomcat.load(folder)
        elif DOORS[name].store == _HF:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder)
        else:
            loaded = _rebuilt(name, model)
            loaded.load_state_dict(model.state_dict())
        return all(torch.equal(here, there) for here, there in zip(
            tokens_and_outputs(loaded.eval(), inputs), tokens_and_outputs(model, inputs),
            strict=True))


def _rebuilt(name: str, model: Any) -> Any:
    dense = built(name)
    if isinstance(dense, nn.Linear | nn.MultiheadAttention):
        return adacomcat.compress(dense, plan=model.rank_plan)
    return build_skeleton(dense, model.rank_plan)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(((here - there).norm() / there.norm().clamp_min(1e-30)).item()
               for here, there in zip(found, expected, strict=True))


def row(name: str, outcome: Outcome) -> tuple[str, ...]:
    """One line of the table in docs/families.md."""
    order = ("qk", "q", "k", "vo", "hidden", "linear")
    right = {way: outcome.kept[way] <= KEEP and outcome.errors[way] < 2 for way in outcome.kept}
    same = outcome.same_when_loaded
    return (DOORS[name].library, f"`{name}`",
            ", ".join(kind for kind in order if kind in outcome.kinds),
            "same" if outcome.full_rank <= SAME else f"{outcome.full_rank:.0e}",
            "yes" if right["data-free"] else "no", "yes" if right["calibrated"] else "no",
            (" and ".join(outcome.fused) or "–") if outcome.fused_error <= FUSED else "differs",
            DOORS[name].store if same else "differs")


def rows() -> list[tuple[str, ...]]:
    return [row(name, tried(name)) for name in DOORS]


if __name__ == "__main__":
    for door in DOORS:
        found = tried(door)
        print(f"{door:28} full rank {found.full_rank:.1e}  "
              + "  ".join(f"{way} kept {found.kept[way]:.3f} error {found.errors[way]:.3f}"
                          for way in found.kept)
              + f"  fused {found.fused} {found.fused_error:.1e}  loaded {found.same_when_loaded}",
              flush=True)
