"""Tiny models of several families."""

import timm
import torch

import adacomcat
from adacomcat.utils.model import input_size

SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7}
FAMILIES = {
    "vit_tiny_patch16_224": {"img_size": 32, **SMALL},
    "deit3_small_patch16_224": {"img_size": 32, **SMALL, "global_pool": "avg"},
    "vit_small_patch14_dinov2": {"img_size": 28, **SMALL, "num_classes": 0},
    "beit_base_patch16_224": {"img_size": 32, **SMALL, "in_chans": 1},
    "eva02_tiny_patch14_224": {"img_size": 28, **SMALL},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 32, "depths": (1, 1),
                                     "num_heads": (2, 2), "num_classes": 7},
}


def dense_model(architecture="vit_tiny_patch16_224", seed=0, **args):
    torch.manual_seed(seed)
    model = timm.create_model(architecture, **(args or FAMILIES[architecture])).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def compressed(architecture="vit_tiny_patch16_224", **args):
    model = dense_model(architecture, **args)
    return adacomcat.compress(model, plan=adacomcat.RankPlan.uniform(model, 0.7, multiple=4))


def images(model, count=2):
    return torch.randn(count, *input_size(model))
