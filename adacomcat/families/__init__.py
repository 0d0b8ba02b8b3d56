"""What attentions and MLPs look like: one file for each library, and a door for your own classes.

A file here reads modules of one library into the parts of ``layers/registry.py``, and holds the
drop-ins that have that library's signatures. ``layers/registry.py`` imports the files by name at
the first look-up.
"""

from adacomcat.families.registration import register_attention
from adacomcat.layers.attention import LowRankAttention, ValueFoldedAttention
from adacomcat.layers.registry import AttentionParts, Projection, Tier

__all__ = ["AttentionParts", "LowRankAttention", "Projection", "Tier", "ValueFoldedAttention",
           "register_attention"]
