"""The command line in a process of its own, and flags of tiny models."""

import os
import subprocess
import sys

ARCHITECTURE = "vit_tiny_patch16_224"
SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2}
MODEL = ["-m", ARCHITECTURE, "--img-size", "32", "--num-classes", "10",
         "--model-kwargs", *(f"{key}={value}" for key, value in SMALL.items())]
GRAY = ["-m", ARCHITECTURE, "--img-size", "16", "--in-chans", "1", "--num-classes", "10",
        "--model-kwargs", "patch_size=8", *(f"{key}={value}" for key, value in SMALL.items())]
QUICK = ["--data", "digits", "-b", "128", "--calibration-images", "32", "--search-steps", "2"]


def shell(*argv, **env):
    return subprocess.run([sys.executable, "-m", *map(str, argv)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
