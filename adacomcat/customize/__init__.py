"""Customising text-to-image models of diffusers by low-rank products beside their attentions.

The functions here take a diffusers pipeline, or its U-Net or transformer. Nothing of this package
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
from adacomcat.customize.files import AdapterFile, load_adapters, load_comcat, save_adapters
from adacomcat.customize.lora import from_lora, to_lora

__all__ = ["AdapterFile", "adapter_parameters", "add_adapters", "from_lora", "load_adapters",
           "load_comcat", "merge_", "parameter_count", "save_adapters", "set_alpha", "to_lora",
           "unload_"]
