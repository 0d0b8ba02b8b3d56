"""Runs PTX, what Triton hands to ptxas, on numpy: no GPU, and every access checked."""
