"""Calibration takes what a model takes: tensors, mappings, tuples, loaders, data sets."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.models import dense_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import adacomcat
from adacomcat import UserError
from adacomcat.convert.calibrate import calibration_batches
from adacomcat.utils.inputs import Batch, joined


class Named(nn.Module):
    """A ViT with arguments by name and outputs in a dictionary, beside what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dense_model()

    def forward(self, pixel_values: Tensor | None = None, strength: Tensor | None = None,
                doubled: bool = False) -> dict[str, Any]:
        assert pixel_values is not None
        if strength is not None:
            pixel_values = pixel_values * strength[:, None, None, None]
        return {"logits": self.inner(2 * pixel_values if doubled else pixel_values), "loss": None}


class Pair(Named):
    """Two images, both required, and a list of outputs."""

    def forward(self, left: Tensor, right: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [self.inner(left), self.inner(right + left)]


def weights(model: nn.Module, calibration: Any, **settings: Any) -> dict[str, Tensor]:
    return dict(adacomcat.compress(model, keep_params=0.6, calibration=calibration,
                                   **settings).state_dict())


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first)


IMAGES, LABELS = torch.randn(20, 3, 32, 32), torch.arange(20) % 7
GIVEN = {
    "mapping": {"pixel_values": IMAGES},
    "mapping with labels": {"pixel_values": IMAGES, "labels": LABELS},
    "mappings": [{"pixel_values": IMAGES[:16]}, {"pixel_values": IMAGES[16:]}],
    "loader": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16),
    "soft labels": [(IMAGES, torch.rand(20, 7))],
    "mapping and labels": [({"pixel_values": IMAGES}, LABELS)],
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_every_form_of_the_same_images_compresses_alike(given: Any) -> None:
    model = Named()
    assert equal(weights(model, IMAGES), weights(model, given))


def test_other_arguments_reach_the_model() -> None:
    model, strength = Named(), torch.linspace(0.1, 2, 20)
    scaled = IMAGES * strength[:, None, None, None]
    given = {"pixel_values": IMAGES, "strength": strength, "doubled": True}
    assert equal(weights(model, 2 * scaled), weights(model, given))
    assert equal(weights(model, 2 * scaled, refine=2), weights(model, given, refine=2))


def test_a_tuple_has_as_many_arguments_as_the_model_requires() -> None:
    model, other = Pair(), torch.randn(20, 3, 32, 32)
    by_name = weights(model, {"left": IMAGES, "right": other})
    assert equal(by_name, weights(model, [(IMAGES, other, LABELS)]))
    assert not equal(by_name, weights(model, [(IMAGES, -other, LABELS)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_mappings_of_float32(dtype: torch.dtype) -> None:
    found = weights(Named().to(dtype), {"pixel_values": IMAGES, "strength": torch.ones(20)})
    assert all(value.dtype == dtype and value.isfinite().all() for value in found.values())


def test_a_calibration_keeps_arguments(tmp_path: Any) -> None:
    model = Named()
    given = {"pixel_values": IMAGES, "strength": torch.linspace(0.1, 2, 20), "doubled": True}
    kept = adacomcat.calibrate(model, given)
    kept.save(tmp_path / "calibration.safetensors")
    read = adacomcat.Calibration.load(tmp_path / "calibration.safetensors")
    [first, second] = read.batches or []
    assert isinstance(first, Batch) and (len(first), len(second)) == (16, 4)
    torch.testing.assert_close(dict(joined([first, second]).named), given)
    assert equal(weights(model, kept), weights(model, read))


class Rows:
    """A data set of Hugging Face in what it has of its interface: rows without a batch."""

    format = {"type": None}

    def __init__(self, tensors: bool = False) -> None:
        self.tensors = tensors

    def with_format(self, kind: str) -> "Rows":
        assert kind == "torch"
        return Rows(tensors=True)

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = IMAGES[index] if self.tensors else IMAGES[index].tolist()
        return {"pixel_values": image, "label": int(LABELS[index])}

    def __iter__(self) -> Any:
        return (self[index] for index in range(len(self)))


def test_a_data_set_of_rows_is_batched() -> None:
    model = Named()
    assert equal(weights(model, IMAGES), weights(model, Rows()))


def test_tokens_are_no_pictures() -> None:
    """A model without convolutions takes rows of any dimensions."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    tokens = torch.randn(40, 9, 32)
    small = adacomcat.compress(encoder, keep_params=0.6, calibration=tokens)
    free = adacomcat.compress(encoder, keep_params=0.6)
    error, data_free = ((made(tokens) - encoder(tokens)).norm().item() for made in (small, free))
    assert error < 0.9 * data_free


@pytest.mark.parametrize(("given", "says"), [
    ({"pixel_values": IMAGES, "name": ["a"] * 20}, "name must be a tensor; got list"),
    ({"labels": LABELS}, "must map names of the model's arguments to tensors"),
    ({"pixel_values": IMAGES.to(torch.uint8), "doubled": True}, "normalised real numbers"),
    ({"pixels": IMAGES}, r"cannot run on calibration images of shape pixels \(3, 32, 32\)"),
    ({"pixel_values": IMAGES * torch.nan, "doubled": True}, "NaN or infinite"),
    ({"pixel_values": IMAGES[:0], "doubled": True}, "holds no image"),
    ([()], "got tuple"),
])
def test_what_the_model_does_not_take_is_one_line(given: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        adacomcat.compress(Named(), keep_params=0.6, calibration=given)
    assert "\n" not in str(raised.value)


def test_rows_are_cut_and_joined_together() -> None:
    model, strength = Named(), torch.linspace(0, 1, 20)
    batches = calibration_batches({"pixel_values": IMAGES, "strength": strength,
                                   "doubled": False}, model)
    assert [len(batch) for batch in batches] == [16, 4]
    whole = joined(batches)
    assert isinstance(whole, Batch)
    torch.testing.assert_close(whole.named["strength"], strength)
    assert whole.named["doubled"] is False
