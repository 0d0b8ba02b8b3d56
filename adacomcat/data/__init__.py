"""Images and labels: datasets, picture folders, batches, augmentation, collages."""

from adacomcat.data.batches import Batches, EndlessBatches, split_holdout
from adacomcat.data.collage import collages, with_collages
from adacomcat.data.datasets import (
    ARRAY_DATASETS,
    LabelledImages,
    TensorImages,
    model_data_config,
    train_and_test,
)
from adacomcat.data.folder import (
    FolderImages,
    PictureAugmentation,
    image_tensor_files,
    pictures_under,
)
from adacomcat.data.named import Splits, is_named
from adacomcat.moved import forward

__all__ = ["ARRAY_DATASETS", "Batches", "EndlessBatches", "FolderImages", "LabelledImages",
           "PictureAugmentation", "Splits", "TensorImages", "collages", "image_tensor_files",
           "is_named", "model_data_config", "pictures_under", "split_holdout", "train_and_test",
           "with_collages"]

__getattr__ = forward(__name__, ("data.datasets",))
