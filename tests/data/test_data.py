"""Data: the same pixels for every (seed, epoch, step), whatever the processes; clear refusals."""

import gzip
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pictures import RGB_32, write_pictures
from torch import Tensor

from adacomcat.data import Batches, datasets, image_tensor_files, split_holdout
from adacomcat.data.augmentation import Augmentation
from adacomcat.errors import UserError

GREY_8 = {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,), "num_classes": 10}


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for seed, (split, label, count) in enumerate(
        [("train", "cat", 9), ("train", "dog", 8), ("val", "cat", 3), ("val", "dog", 2)]
    ):
        write_pictures(tmp_path / split / label, count, seed)
    return tmp_path


def digits() -> datasets.TensorImages:
    return datasets.train_and_test("digits", None, GREY_8)[0]


def folder_train(image_folder: Path) -> datasets.FolderImages:
    return datasets.train_and_test("folder", image_folder, RGB_32)[0]


def collect(batches: Batches) -> list[tuple[Tensor, Tensor]]:
    return list(batches)


def assert_same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> None:
    assert len(left) == len(right) > 0
    for (x, y), (other_x, other_y) in zip(left, right, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


@pytest.fixture(params=["array", "folder"])
def dataset(request: pytest.FixtureRequest) -> datasets.TensorImages | datasets.FolderImages:
    if request.param == "array":
        return digits()
    return folder_train(request.getfixturevalue("image_folder"))


EPOCH = {"batch_size": 6, "shuffle": True, "augment": True}


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bundled = load_digits()
    train, test = datasets.train_and_test("digits", None, GREY_8)
    assert len(test) == 360 and len(train) == len(bundled.target) - 360
    found = [(x.flatten() * 16).round().tolist() + [y] for part in (train, test) for x, y in part]
    columns = np.column_stack([bundled.data, bundled.target]).tolist()
    assert sorted(found) == sorted(columns)
    counts = np.bincount(bundled.target)
    assert (test.labels.bincount().numpy() - counts / 5).__abs__().max() < 1


def test_pixels_are_resized_and_normalised_per_channel() -> None:
    small, _ = datasets.train_and_test("digits", None, GREY_8)
    large, _ = datasets.train_and_test("digits", None, RGB_32)
    mean, std = (torch.tensor(RGB_32[key]).view(3, 1, 1) for key in ("mean", "std"))
    image, label = large[5]
    expected = torch.nn.functional.interpolate(small[5][0][None], (32, 32), mode="bilinear")[0]
    assert image.shape == (3, 32, 32) and label == small[5][1]
    assert torch.allclose(image * std + mean, expected.expand(3, -1, -1), atol=1e-5)


def test_fashion_mnist_is_read_from_idx_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    written = {}
    for part, count in (("train", 12), ("t10k", 5)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        written[part] = images, generator.integers(0, 10, count, dtype=np.uint8)
        write_idx(tmp_path, part, *written[part])
    config = GREY_8 | {"input_size": (1, 28, 28)}
    for dataset, part in zip(
        datasets.train_and_test("fashion-mnist", tmp_path, config), written, strict=True
    ):
        for (image, label), pixels, expected in zip(dataset, *written[part], strict=True):
            assert label == expected
            assert np.array_equal((image[0] * 255).round().numpy(), pixels)


def test_fashion_mnist_of_the_debian_package_is_found(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, count in (("train", 9), ("t10k", 4)):
        write_idx(tmp_path, part, np.full((count, 28, 28), 51, np.uint8),
                  np.arange(count, dtype=np.uint8))
    monkeypatch.setattr(datasets, "FASHION_MNIST_FOLDER", tmp_path)
    train, test = datasets.train_and_test("fashion-mnist", None,
                                          GREY_8 | {"input_size": (1, 28, 28)})
    assert (len(train), len(test)) == (9, 4)
    assert train[3][1] == 3 and np.allclose(train[3][0], 0.2)


def test_an_epoch_is_a_function_of_seed_and_epoch(dataset: datasets.Dataset) -> None:
    def epoch(seed: int, number: int) -> list[tuple[Tensor, Tensor]]:
        return collect(Batches(dataset, **EPOCH, seed=seed, epoch=number))

    first = epoch(1, 2)
    torch.rand(7), random.random(), np.random.rand()
    assert_same(first, epoch(1, 2))
    assert not torch.equal(first[0][0], epoch(1, 3)[0][0])
    assert not torch.equal(first[0][0], epoch(2, 2)[0][0])


def test_loading_leaves_the_global_generators_alone(dataset: datasets.Dataset) -> None:
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    next(iter(Batches(dataset.subset(torch.arange(6)), **EPOCH, seed=0, epoch=0)))
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_together_are_the_batch_of_one_process(
    dataset: datasets.Dataset, world_size: int, shuffle: bool
) -> None:
    options = EPOCH | {"shuffle": shuffle, "seed": 4, "epoch": 1}
    whole = collect(Batches(dataset, **options))
    shards = [
        collect(Batches(dataset, **options, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for step, (images, labels) in enumerate(whole):
        for rank, shard in enumerate(shards):
            assert torch.equal(shard[step][0], images[rank::world_size])
            assert torch.equal(shard[step][1], labels[rank::world_size])


def test_an_epoch_resumes_at_a_step(dataset: datasets.Dataset) -> None:
    options = EPOCH | {"seed": 6, "epoch": 3}
    whole = collect(Batches(dataset, **options))
    resumed = Batches(dataset, **options, start_step=1)
    assert len(resumed) == len(whole) - 1
    assert_same(collect(resumed), whole[1:])
    assert collect(Batches(dataset, **options, start_step=len(whole))) == []


def test_an_epoch_ends_after_so_many_steps(dataset: datasets.Dataset) -> None:
    options = EPOCH | {"seed": 6, "epoch": 3}
    whole = collect(Batches(dataset, **options))
    assert_same(collect(Batches(dataset, **options, steps=2)), whole[:2])
    assert_same(collect(Batches(dataset, **options, steps=2, start_step=1)), whole[1:2])
    assert len(Batches(dataset, **options, steps=10_000)) == len(whole)


def test_worker_processes_change_nothing(image_folder: Path) -> None:
    dataset = folder_train(image_folder)
    options = EPOCH | {"seed": 7, "epoch": 0}
    assert_same(
        collect(Batches(dataset, **options)),
        collect(Batches(dataset, **options, num_workers=2)),
    )


def test_shuffling_visits_each_image_once_and_evaluation_all_in_order() -> None:
    dataset = digits()
    ids = torch.arange(len(dataset))
    dataset.labels = ids
    seen = torch.cat([y for _, y in Batches(dataset, 100, shuffle=True, seed=0, epoch=0)])
    assert len(seen) == 1400 and len(seen.unique()) == 1400
    batches = Batches(dataset, 100, shuffle=False, seed=0, epoch=0)
    assert len(batches) == 15
    assert torch.equal(torch.cat([y for _, y in batches]), ids)


def test_holdout_is_a_random_disjoint_part() -> None:
    dataset = digits()
    dataset.labels = torch.arange(len(dataset))
    train, holdout = split_holdout(dataset, 0.25, seed=1)
    assert len(holdout) == round(0.25 * len(dataset))
    assert sorted(train.labels.tolist() + holdout.labels.tolist()) == dataset.labels.tolist()
    assert torch.equal(holdout.labels, split_holdout(dataset, 0.25, seed=1)[1].labels)
    assert not torch.equal(holdout.labels, split_holdout(dataset, 0.25, seed=2)[1].labels)
    assert abs(holdout.labels.float().mean() / len(dataset) - 0.5) < 0.1


def test_holdout_of_a_folder_is_disjoint(image_folder: Path) -> None:
    parts = split_holdout(folder_train(image_folder), 0.3, seed=0)
    assert sorted(torch.cat([part.indices for part in parts]).tolist()) == list(range(17))


def test_augmentation_shifts_flips_and_erases() -> None:
    images = torch.randint(1, 256, (5, 2, 28, 28), dtype=torch.uint8)
    flip = torch.tensor([False, True, False, False, True])
    shift = torch.tensor([[0, 0], [0, 0], [2, -1], [0, 0], [-2, 2]])
    erase = torch.zeros(5, 4, dtype=torch.long)
    erase[3] = torch.tensor([4, 5, 9, 12])
    out = Augmentation(flip, shift, erase).apply(images)
    assert torch.equal(out[0], images[0])
    assert torch.equal(out[1], images[1].flip(-1))
    assert torch.equal(out[2, :, :26, 1:], images[2, :, 2:, :-1])
    assert not out[2, :, 26:].any() and not out[2, :, :, 0].any()
    assert not out[3, :, 4:9, 5:12].any() and (out[3] == 0).sum() == 2 * 5 * 7
    assert torch.equal(out[4, :, 2:, 2:], images[4].flip(-1)[:, :-2, :-2])


def test_drawn_augmentation_stays_in_bounds_and_never_flips_digits() -> None:
    for size in ((8, 8), (28, 28), (30, 60)):
        drawn = Augmentation.draw(2000, size, False, torch.Generator().manual_seed(size[1]))
        height, width = size
        assert not drawn.flip.any()
        reach = torch.tensor([height // 28, width // 28])
        assert torch.equal(drawn.shift.abs().amax(0), reach)
        top, left, bottom, right = drawn.erase.unbind(1)
        assert top.min() >= 0 and left.min() >= 0
        assert bottom.max() <= height and right.max() <= width
        assert 0.2 < (bottom > top).float().mean() < 0.3
    assert digits().flips is False


def test_calibration_pictures_equal_the_evaluation_transform(image_folder: Path) -> None:
    dataset = datasets.train_and_test("folder", image_folder, RGB_32)[1]
    images = image_tensor_files(image_folder / "val", RGB_32)
    assert torch.equal(images, torch.stack([image for image, _ in dataset]))


def test_model_data_config_says_how_the_model_was_built() -> None:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, num_classes=10, depth=1
    )
    config = datasets.model_data_config(model)
    assert config["input_size"] == (1, 28, 28) and config["num_classes"] == 10
    plain = datasets.model_data_config(timm.create_model("resnet18"))
    assert plain["input_size"] == (3, 224, 224) and plain["num_classes"] == 1000


def break_train(folder: Path) -> None:
    for path in (folder / "train").rglob("*.png"):
        path.unlink()


def break_train_names(folder: Path) -> None:
    (folder / "train").rename(folder / "training")


def break_classes(folder: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "wolf")


def break_layout(folder: Path) -> None:
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "0.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_train, "no readable pictures .*train"),
        (break_train_names, "no folder train "),
        (break_classes, "different classes .*dog"),
        (break_layout, "outside class folders"),
    ],
)
def test_a_damaged_folder_is_refused(image_folder: Path, damage: object, message: str) -> None:
    damage(image_folder)
    with pytest.raises(UserError, match=message):
        datasets.train_and_test("folder", image_folder, RGB_32)


def test_an_unreadable_picture_is_named(image_folder: Path) -> None:
    path = image_folder / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="cat/0.png"):
        folder_train(image_folder)[0]
    with pytest.raises(UserError, match="cat/0.png"):
        image_tensor_files(image_folder / "train", RGB_32)


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_folders_without_data_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    if name == "empty":
        folder.mkdir()
    for dataset in ("folder", "fashion-mnist"):
        with pytest.raises(UserError, match=name):
            datasets.train_and_test(dataset, folder, RGB_32)
    with pytest.raises(UserError, match=name):
        image_tensor_files(folder, RGB_32)
    assert folder.exists() == (name == "empty")


def test_an_idx_file_is_read_no_further_than_its_header_says(tmp_path: Path) -> None:
    """A few bytes may promise, or unpack to, more than the machine has."""
    labels = np.zeros(4, np.uint8)
    write_idx(tmp_path, "t10k", np.zeros((4, 28, 28), np.uint8), labels)
    write_idx(tmp_path, "train", np.zeros((4, 28, 28), np.uint8), labels)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for promised, given in ((2**32 - 1, 50), (4, 10**7)):
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, promised, 28, 28)
        path.write_bytes(gzip.compress(header + bytes(given)))
        tracemalloc.start()
        try:
            with pytest.raises(UserError, match="is no IDX file of bytes with 3 dimensions"):
                datasets.train_and_test("fashion-mnist", tmp_path, GREY_8)
            assert tracemalloc.get_traced_memory()[1] < 10**6
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "mismatched"])
def test_damaged_idx_files_are_refused(tmp_path: Path, damage: str) -> None:
    images, labels = np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.uint8)
    write_idx(tmp_path, "t10k", images, labels)
    write_idx(tmp_path, "train", images, labels[: 3 if damage == "mismatched" else 4])
    path = tmp_path / "train-images-idx3-ubyte.gz"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:30])
    if damage == "foreign":
        path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(UserError, match="labels" if damage == "mismatched" else path.name):
        datasets.train_and_test("fashion-mnist", tmp_path, GREY_8)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(UserError, match="unknown dataset 'imagenet'.*digits"):
        datasets.train_and_test("imagenet", None, GREY_8)
    with pytest.raises(UserError, match="1000 classes.*has 10"):
        datasets.train_and_test("digits", None, GREY_8 | {"num_classes": 1000})
    with pytest.raises(UserError, match="needs --data-dir"):
        datasets.train_and_test("folder", None, GREY_8)
    for fraction in (0.0, 1.0, 1e-6):
        with pytest.raises(UserError, match="holdout"):
            split_holdout(digits(), fraction, seed=0)
    with pytest.raises(UserError, match="leaves some of the 3 processes without an image"):
        Batches(digits(), 2, shuffle=True, seed=0, epoch=0, world_size=3)
    with pytest.raises(UserError, match="larger than the training set"):
        Batches(digits(), 5000, shuffle=True, seed=0, epoch=0)
