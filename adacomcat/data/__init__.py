"""Images and labels: datasets, picture folders, augmentation, collages."""

from adacomcat.data.collage import collages, with_collages
from adacomcat.data.datasets import (
    ARRAY_DATASETS,
    Batches,
    EndlessBatches,
    TensorImages,
    loader,
    model_data_config,
    split_holdout,
    train_and_test,
)
from adacomcat.data.folder import FolderImages, image_tensor_files, pictures_under
from adacomcat.moved import forward

__all__ = ["ARRAY_DATASETS", "Batches", "EndlessBatches", "FolderImages", "TensorImages",
           "collages", "image_tensor_files", "loader",
           "model_data_config", "pictures_under", "split_holdout", "train_and_test",
           "with_collages"]

__getattr__ = forward(__name__, ("data.datasets",))
