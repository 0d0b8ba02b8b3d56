"""Customising text-to-image models of diffusers by low-rank products beside their attentions.

The functions here take a diffusers pipeline, or its U-Net or transformer; those of adapters and
their files take Vision Transformers, too. Nothing of this package
imports diffusers before a pipeline is opened.
"""

from adacomcat.customize.adapters import (
    adapter_parameters,
    add_adapters,
    merge_,
    parameter_count,
    set_alpha,
    unload_,
)
from adacomcat.customize.config import CustomizeConfig
from adacomcat.customize.files import AdapterFile, load_adapters, load_comcat, save_adapters
from adacomcat.customize.lora import from_lora, to_lora
from adacomcat.customize.pictures import read_pictures
from adacomcat.customize.pipeline import generate, open_pipeline, picture_grid, save_pipeline
from adacomcat.customize.run import train

__all__ = ["AdapterFile", "CustomizeConfig", "adapter_parameters", "add_adapters", "from_lora",
           "generate", "load_adapters", "load_comcat", "merge_", "open_pipeline", "parameter_count",
           "picture_grid", "read_pictures", "save_adapters", "save_pipeline", "set_alpha",
           "to_lora", "train", "unload_"]
