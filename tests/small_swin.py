"""A Swin that trains in a second, as the command line names it, and images for it."""

from __future__ import annotations

import numpy as np
from PIL import Image

SWIN = "swin_tiny_patch4_window7_224"
SMALL = {"img_size": 16, "patch_size": 2, "window_size": 2, "embed_dim": 16,
         "depths": (1, 1), "num_heads": (2, 4), "drop_path_rate": 0.0}  # fmt: skip
KWARGS = [f"{key}={value}".replace(" ", "") for key, value in SMALL.items()]
PRUNABLE = 12 * (16 * 16 + 32 * 32)


def write_images(folder):
    """Write noise in two classes that differ in brightness: 48 images to train on, 10 to test."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 5)):
        for dark, name in enumerate(("bright", "dark")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 200, (16, 16, 3)) + 55 * (1 - dark)
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / split / name / f"{i}.png")
    return folder
