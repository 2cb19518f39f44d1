"""Draw the pictures of docs/pruning.md: of the CIFAR-10 Swin of docs/results.md, trained.

    python docs/make_pictures.py
"""

from __future__ import annotations

from pathlib import Path

import timm
from safetensors.torch import load_file

import torch_dimap

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
LAYERS = ["layers.0.blocks.0.attn.qkv.weight", "layers.2.blocks.3.mlp.fc1.weight"]


def build():
    """Return the trained network, dense."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=10, img_size=32, patch_size=4, window_size=4,
        embed_dim=24, depths=(2, 2, 6), num_heads=(1, 2, 4), drop_path_rate=0.0,
    )  # fmt: skip
    model.load_state_dict(load_file(ROOT / "examples/results/swin_cifar10.safetensors"))
    return model


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    masked, slim = build(), build()
    groups = torch_dimap.group_parameters(masked)
    thresholds = torch_dimap.global_module_aware_unstructured(groups, amount=0.8)
    torch_dimap.global_module_aware_structured(torch_dimap.group_units(slim), amount=0.5)
    figures = {
        "density": torch_dimap.plot_density(masked, thresholds=thresholds),
        "histograms": torch_dimap.plot_histograms(masked, LAYERS),
        "masks": torch_dimap.plot_masks(masked, LAYERS),
        "units": torch_dimap.plot_units(slim),
    }
    for name, figure in figures.items():
        figure.savefig(PICTURES / f"{name}.png", dpi=80)


if __name__ == "__main__":
    main()
