"""Importing this module puts bench/ and the examples' folders on the module search path."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / part) for part in ("bench", "examples/dinov2", "examples/fashion_mnist")
             if str(ROOT / part) not in sys.path]
