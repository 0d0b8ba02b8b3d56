"""transformers: every Vision Transformer that is known, from its configuration to a folder."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import dense_model
from torch import Tensor, nn

import adacomcat
from adacomcat import RankPlan, UserError, compress, find_sites
from adacomcat.cost import model_macs, model_params
from adacomcat.sites import prunable_mlps

transformers = pytest.importorskip("transformers", minversion="5.24")

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
         "patch_size": 8}
HIDDEN = {"intermediate_size": 96}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4],
        "window_size": 4, "drop_path_rate": 0.0}
WORDS = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 64, "max_position_embeddings": 9}


def config(name: str, **values: Any) -> Any:
    return getattr(transformers, f"{name}Config")(**values)


MODELS: dict[str, Callable[[], Any]] = {
    "ViTModel": lambda: transformers.ViTModel(config("ViT", **SIZES, **HIDDEN)),
    "ViTForImageClassification": lambda: transformers.ViTForImageClassification(
        config("ViT", **SIZES, **HIDDEN, num_labels=5)),
    "DeiTModel": lambda: transformers.DeiTModel(config("DeiT", **SIZES, **HIDDEN)),
    "Dinov2Model": lambda: transformers.Dinov2Model(config("Dinov2", **SIZES, mlp_ratio=2)),
    "Dinov2 SwiGLU": lambda: transformers.Dinov2Model(
        config("Dinov2", **SIZES, mlp_ratio=3, use_swiglu_ffn=True)),
    "Dinov2WithRegisters": lambda: transformers.Dinov2WithRegistersModel(
        config("Dinov2WithRegisters", **SIZES, mlp_ratio=2, num_register_tokens=2)),
    "DINOv3ViTModel": lambda: transformers.DINOv3ViTModel(
        config("DINOv3ViT", **SIZES, **HIDDEN, num_register_tokens=2)),
    "DINOv3 gated": lambda: transformers.DINOv3ViTModel(
        config("DINOv3ViT", **SIZES, **HIDDEN, use_gated_mlp=True)),
    "CLIPVisionModel": lambda: transformers.CLIPVisionModel(
        config("CLIPVision", **SIZES, **HIDDEN)),
    "SiglipVisionModel": lambda: transformers.SiglipVisionModel(
        config("SiglipVision", **SIZES, **HIDDEN)),
    "SwinForImageClassification": lambda: transformers.SwinForImageClassification(
        config("Swin", **SWIN, num_labels=5)),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return roughened(MODELS[name]())


def roughened(model: Any) -> Any:
    """Biases, norms and scales not trivial."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def output(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(pixel_values=images)
    return found.logits if "logits" in found else found.last_hidden_state


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32)


ALL = pytest.mark.parametrize("name", MODELS)


@ALL
def test_full_rank_is_the_dense_model(name: str) -> None:
    dense, x = build(name).double(), images().double()
    kinds = {site.kind for site in find_sites(dense, prunable_mlps(dense))}
    folded = {"q", "k", "vo"} if "DINOv3" in name else {"qk", "vo"}
    assert folded <= kinds
    assert ("hidden" in kinds) == ("SwiGLU" not in name and "gated" not in name)
    small = compress(dense, plan=RankPlan.full(dense))
    assert relative(output(small, x), output(dense, x)) < 1e-12
    assert relative(output(adacomcat.to_plain(small), x), output(dense, x)) < 1e-12
    assert model_macs(dense) > 0


@ALL
def test_compressed_saved_loaded_and_fused(name: str, tmp_path: Any) -> None:
    dense, x = build(name), images(24)
    free = compress(dense, keep_params=0.8)
    small = compress(dense, keep_params=0.8, calibration={"pixel_values": x})
    assert model_params(small) <= 0.8 * model_params(dense)
    assert relative(output(small, x), output(dense, x)) < relative(output(free, x),
                                                                   output(dense, x))
    fused = adacomcat.optimize(small)
    assert relative(output(fused, x), output(small, x)) < 1e-5
    small.save_pretrained(tmp_path / "own")
    adacomcat.save(free, tmp_path / "ours")
    for folder, made in (("own", small), ("ours", free)):
        loaded = type(dense).from_pretrained(tmp_path / folder).eval()
        assert torch.equal(output(loaded, x), output(made, x))
        assert torch.equal(output(adacomcat.load(tmp_path / folder), x), output(made, x))
        assert loaded.rank_plan.ranks


def test_a_fresh_process_loads_by_the_auto_class(tmp_path: Any) -> None:
    small = compress(build("Dinov2Model"), keep_params=0.8)
    small.save_pretrained(tmp_path / "small")
    x = images()
    torch.save((x, output(small, x)), tmp_path / "expected.pt")
    code = f"""
import adacomcat, sys
assert "transformers" not in sys.modules and "timm" not in sys.modules
import torch
from transformers import AutoModel
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModel.from_pretrained({str(tmp_path / "small")!r}).eval()
with torch.no_grad():
    assert torch.equal(model(x).last_hidden_state, expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_backbone_is_loaded_from_a_classifier_and_back(tmp_path: Any) -> None:
    small = compress(build("ViTForImageClassification"), keep_params=0.8)
    small.save_pretrained(tmp_path / "classifier")
    backbone = transformers.ViTModel.from_pretrained(tmp_path / "classifier",
                                                     add_pooling_layer=False).eval()
    x = images()
    torch.testing.assert_close(output(backbone, x), output(small.vit, x), rtol=0, atol=0)
    backbone.save_pretrained(tmp_path / "backbone")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "backbone").eval()
    torch.testing.assert_close(output(again.vit, x), output(small.vit, x), rtol=0, atol=0)


def test_a_new_head_is_saved_as_it_is(tmp_path: Any) -> None:
    model = build("ViTForImageClassification")
    small = compress(model, plan=RankPlan({"classifier": 2, "vit.layers.0.attention.vo": 8}))
    small.classifier = nn.Linear(48, 5)
    small.save_pretrained(tmp_path / "small")
    plan = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert plan["plan"] == {"vit.layers.0.attention.vo": 8}
    loaded = type(model).from_pretrained(tmp_path / "small").eval()
    x = images()
    assert torch.equal(output(loaded, x), output(small, x))


def test_a_model_that_is_dense_again_needs_nothing_of_ours(tmp_path: Any) -> None:
    small = compress(build("ViTForImageClassification"), plan=RankPlan({"classifier": 2}))
    small.save_pretrained(tmp_path / "small")
    small.classifier = nn.Linear(48, 5)
    small.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("keep", [None, 0.7])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "DINOv3 gated", "CLIPVisionModel",
                                  "SwinForImageClassification"])
def test_quantized_models_save_and_load(name: str, keep: float | None, dtype: str,
                                        tmp_path: Any) -> None:
    model = build(name) if keep is None else compress(build(name), keep_params=keep)
    small = adacomcat.quantize(model, dtype=dtype)
    small.save_pretrained(tmp_path / "small")
    loaded = type(build(name)).from_pretrained(tmp_path / "small").eval()
    x = images()
    assert torch.equal(output(loaded, x), output(small, x))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_quantized_backbone_loads_alone(tmp_path: Any) -> None:
    small = adacomcat.quantize(compress(build("ViTForImageClassification"), keep_params=0.7))
    small.save_pretrained(tmp_path / "small")
    backbone = transformers.ViTModel.from_pretrained(tmp_path / "small",
                                                     add_pooling_layer=False).eval()
    x = images()
    assert torch.equal(backbone(x).last_hidden_state, small.vit(x).last_hidden_state)


def test_the_plain_form_is_kept(tmp_path: Any) -> None:
    plain = adacomcat.to_plain(compress(build("CLIPVisionModel"), keep_params=0.8))
    plain.save_pretrained(tmp_path / "plain")
    loaded = type(plain).from_pretrained(tmp_path / "plain").eval()
    x = images()
    assert torch.equal(output(loaded, x), output(plain, x))


def test_hidden_states_and_attentions_are_recorded() -> None:
    dense = build("Dinov2Model")
    dense.set_attn_implementation("eager")
    x = images()
    expected = dense(x, output_hidden_states=True, output_attentions=True)
    for model in (dense, build("Dinov2Model")):  # hooks are there already, or not yet
        small = compress(model, plan=RankPlan.full(model))
        found = small(x, output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(found.hidden_states, expected.hidden_states)
        torch.testing.assert_close(found.attentions, expected.attentions)
        fused = adacomcat.optimize(small)
        torch.testing.assert_close(fused(x, output_hidden_states=True).hidden_states,
                                   expected.hidden_states, rtol=1e-4, atol=1e-4)
        with pytest.raises(UserError, match="write no attention weights"):
            fused(x, output_attentions=True)


@pytest.mark.parametrize("name", ["ViTModel", "CLIPVisionModel", "DINOv3ViTModel", "DINOv3 gated"])
def test_layers_are_fused(name: str) -> None:
    dense = build(name)
    small = compress(dense, plan=RankPlan.uniform(dense, 0.5, multiple=4))
    kinds = [type(module).__name__ for module in adacomcat.optimize(small).modules()]
    attentions = sum(kind in ("FusedAttention", "FusedRotaryTokens") for kind in kinds)
    mlps = sum(kind in ("FusedMlp", "FusedDenseMlp", "FusedGatedMlp") for kind in kinds)
    assert attentions == mlps == 2
    assert "FusedPatches" in kinds


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_texts_with_padding_are_causal(implementation: str) -> None:
    torch.manual_seed(0)
    dense: Any = roughened(transformers.CLIPTextModel(config("CLIPText", **WORDS))).double()
    dense.set_attn_implementation(implementation)
    words, mask = torch.randint(3, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:] = 0
    small = compress(dense, plan=RankPlan.full(dense))
    for given in ({}, {"attention_mask": mask}):
        expected = dense(words, **given).last_hidden_state
        assert relative(small(words, **given).last_hidden_state, expected) < 1e-6  # eager: float32
        fused = adacomcat.optimize(small)
        assert relative(fused(words, **given).last_hidden_state, expected) < 1e-6
    calibrated = compress(dense, keep_params=0.9, calibration={"input_ids": words})
    assert calibrated(words).last_hidden_state.isfinite().all()


def test_towers_of_pictures_and_texts(tmp_path: Any) -> None:
    torch.manual_seed(0)
    vision = config("CLIPVision", **SIZES, **HIDDEN).to_dict()
    dense: Any = roughened(transformers.CLIPModel(config(
        "CLIP", text_config=config("CLIPText", **WORDS).to_dict(), vision_config=vision,
        projection_dim=16)))
    given = {"input_ids": torch.randint(3, 50, (20, 9)), "pixel_values": images(20)}
    small = compress(dense, keep_params=0.8, calibration=given)
    assert model_macs(small) < model_macs(dense)
    small.save_pretrained(tmp_path / "clip")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "clip").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**given).image_embeds, small(**given).image_embeds)


def test_siglip2_takes_patches_under_a_mask() -> None:
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "image_size"}
    dense: Any = roughened(transformers.Siglip2VisionModel(
        config("Siglip2Vision", **sizes, **HIDDEN, num_patches=16))).double()
    mask = torch.ones(12, 16, dtype=torch.long)
    mask[::2, 12:] = 0
    shapes = torch.tensor([[3, 4], [4, 4]]).repeat(6, 1)
    given = {"pixel_values": torch.randn(12, 16, 192).double(), "pixel_attention_mask": mask,
             "spatial_shapes": shapes}
    small = compress(dense, plan=RankPlan.full(dense))
    expected = dense(**given).pooler_output
    assert relative(small(**given).pooler_output, expected) < 1e-12
    assert relative(adacomcat.optimize(small)(**given).pooler_output, expected) < 1e-10
    calibrated = compress(dense, keep_params=0.8, calibration=given)
    assert calibrated(**given).pooler_output.isfinite().all() and model_macs(dense) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    dense = build("ViTModel").to(dtype)
    small = compress(dense, keep_params=0.8, calibration={"pixel_values": images(24)})
    assert output(small, images()).isfinite().all()


def test_a_backbone_inside_a_model_of_ones_own(tmp_path: Any) -> None:
    """The plan's names are those of the outer model; the part knows its own."""
    held = nn.Sequential(nn.Identity(), build("ViTModel"))
    x = images(24)
    small: Any = compress(held, keep_params=0.8, calibration=x)
    assert "1.layers.0.attention.qk" in small.rank_plan.ranks
    small[1].save_pretrained(tmp_path / "part")
    loaded = transformers.ViTModel.from_pretrained(tmp_path / "part").eval()
    assert torch.equal(output(loaded, x), output(small[1], x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_trainer_trains(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    small = compress(build("ViTForImageClassification"), keep_params=0.8)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    rows = [{"pixel_values": image, "labels": label % 5} for label, image in enumerate(images(8))]
    trainer = transformers.Trainer(
        small, transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[],
            use_cpu=True, save_strategy="no", learning_rate=1e-2), train_dataset=rows)
    trainer.train()
    after = small.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"vit.layers.0.attention.wq", "vit.layers.1.attention.wo"} <= changed
    trainer.save_model(str(tmp_path / "trained"))
    loaded = type(small).from_pretrained(tmp_path / "trained").eval()
    x = images()
    assert torch.equal(output(loaded, x), output(small.eval(), x))


@pytest.mark.parametrize("dense", [False, True])
def test_an_optimized_model_is_not_saved(dense: bool, tmp_path: Any) -> None:
    model = build("ViTModel")
    fused: Any = adacomcat.optimize(model if dense else compress(model, keep_params=0.8))
    for save in (fused.save_pretrained, lambda folder: adacomcat.save(fused, folder)):
        with pytest.raises(UserError, match="not its optimized copy"):
            save(tmp_path / "fused")


def test_layers_that_a_user_changed_stay_dense() -> None:
    dense = build("ViTModel")
    dense.layers[0].attention.register_forward_hook(lambda module, args, found: None)
    with pytest.warns(UserWarning, match="layers.0.attention"):
        small: Any = compress(dense, keep_params=0.9)
    assert type(small.layers[0].attention) is type(dense.layers[0].attention)
    assert type(small.layers[1].attention) is not type(dense.layers[1].attention)


# Fitted in sequence, as timm's models are


def twins() -> tuple[Any, Any]:
    """A ViT of timm and one of transformers with the same weights."""
    ours = dense_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2,
                       num_heads=3, mlp_ratio=2, num_classes=5).double()
    theirs = transformers.ViTForImageClassification(config(
        "ViT", **SIZES, **HIDDEN, num_labels=5, layer_norm_eps=1e-6)).double().eval()
    known, found = ours.state_dict(), {}
    q, k, v = "q_proj", "k_proj", "v_proj"
    for name in theirs.state_dict():
        here = theirs_to_timm(name)
        part = next((place for place, part in enumerate((q, k, v)) if part in name), None)
        found[name] = known[here] if part is None else known[here].chunk(3)[part]
    theirs.load_state_dict(found)
    return ours, theirs


def theirs_to_timm(name: str) -> str:
    for there, here in (("vit.embeddings.cls_token", "cls_token"),
                        ("vit.embeddings.position_embeddings", "pos_embed"),
                        ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
                        ("vit.layernorm.", "norm."), ("vit.layers.", "blocks."),
                        ("attention.o_proj", "attn.proj"), ("attention.q_proj", "attn.qkv"),
                        ("attention.k_proj", "attn.qkv"), ("attention.v_proj", "attn.qkv"),
                        ("attention.", "attn."), ("layernorm_before", "norm1"),
                        ("layernorm_after", "norm2"), ("classifier", "head")):
        name = name.replace(there, here)
    return name


def test_the_same_weights_are_fitted_to_images_as_in_timm() -> None:
    ours, theirs = twins()
    x = images(40).double()
    assert relative(output(theirs, x), ours(x)) < 1e-12
    plan = {site.name: site.full_rank // 2 for site in find_sites(theirs, prunable_mlps(theirs))}
    timms = RankPlan({theirs_to_timm(name): rank for name, rank in plan.items()})
    expected = compress(ours, plan=timms, calibration=x)
    found = compress(theirs, plan=RankPlan(plan), calibration={"pixel_values": x})
    assert relative(output(found, x), expected(x)) < 1e-8
    cut = compress(theirs, plan=RankPlan(plan), calibration=adacomcat.calibrate(
        theirs, x, keep_images=False))
    assert relative(output(found, x), output(theirs, x)) < relative(output(cut, x),
                                                                    output(theirs, x))


def test_images_under_a_mask_do_not_calibrate() -> None:
    mask = torch.ones(4, 17, dtype=torch.bool)
    mask[0, 9:] = False
    given = {"pixel_values": images(4), "attention_mask": mask}
    with pytest.raises(UserError, match="leave out attention_mask"):
        compress(build("ViTModel"), keep_params=0.8, calibration=given)
