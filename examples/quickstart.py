"""Train, prune, fine-tune, bake, save and reload a small Swin on handwritten digits.

Downloads nothing: scikit-learn ships the 1797 images. The Swin (0.5 million weights) is
trained from scratch, then pruned with DIMAP and, beside it, uniformly (the same share of
the smallest weights of every layer). One table shows top-1 before and after fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from tqdm import tqdm

import torch_dimap

BATCH = 128


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images, test images, training labels, test labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=16, mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target)
    split = train_test_split(
        range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target
    )
    train, test = (torch.tensor(part) for part in split)
    return images[train], images[test], labels[train], labels[test]


def build_model() -> nn.Module:
    return SwinTransformer(
        img_size=16, patch_size=2, in_chans=1, num_classes=10, window_size=4,
        embed_dim=64, depths=(2, 2), num_heads=(2, 4),
    )  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float) -> None:
    """Train with AdamW and a cosine schedule on randomly shifted images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc="training", leave=False) as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(BATCH):
                shift = tuple(torch.randint(-1, 2, (2,)).tolist())
                outputs = model(images[batch].roll(shift, (2, 3)))
                loss = F.cross_entropy(outputs, labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the percentage of correctly classified images."""
    model.eval()
    correct = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(BATCH), labels.split(BATCH))
    )
    return 100 * correct / len(labels)


def prune(model: nn.Module, method: str, amount: float) -> None:
    groups = torch_dimap.group_parameters(model)
    if method == "uniform":  # every layer a group of its own
        groups = {f"{g}.{i}": [pair] for g, pairs in groups.items() for i, pair in enumerate(pairs)}
    torch_dimap.global_module_aware_unstructured(groups, amount=amount)


def bake_save_reload(model: nn.Module, path: Path) -> nn.Module:
    """Make the zeros permanent and carry them through a file into a fresh model."""
    torch_dimap.remove_all(model)
    save_file(model.state_dict(), path)
    fresh = build_model()
    fresh.load_state_dict(load_file(path))
    return fresh


def run(seed: int, options: argparse.Namespace) -> list[dict]:
    """Do all of it for one seed; return a row for each amount and method."""
    torch.manual_seed(seed)
    train_images, test_images, train_labels, test_labels = load_data()
    dense = build_model()
    train(dense, train_images, train_labels, options.epochs, lr=2e-3)
    dense_top1 = top1(dense, test_images, test_labels)
    print(f"seed {seed}: dense top-1 {dense_top1:.2f} %")
    rows = []
    for amount in options.amounts:
        for method in ("DIMAP", "uniform"):
            model = copy.deepcopy(dense)
            prune(model, method, amount)
            one_shot = top1(model, test_images, test_labels)
            train(model, train_images, train_labels, options.finetune_epochs, lr=5e-4)
            path = options.output / f"swin_digits_{method.lower()}_{amount:.2f}.safetensors"
            baked = bake_save_reload(model, path)
            summary = torch_dimap.summarize(baked, test_images[:1]).to_dict()["total"]
            rows.append({
                "amount": amount, "method": method, "dense": dense_top1, "one_shot": one_shot,
                "fine_tuned": top1(baked, test_images, test_labels),
                **summary,
            })  # fmt: skip
    return rows


def print_table(rows: list[dict], seeds: list[int]) -> None:
    pass


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--amounts", type=float, nargs="+", default=[0.15, 0.35, 0.55, 0.8, 0.9], metavar="A")
    add("--seeds", type=int, nargs="+", default=[0], metavar="S")
    add("--epochs", type=int, default=30, help="of dense training")
    add("--finetune-epochs", type=int, default=5)
    add("--output", type=Path, metavar="DIR", help="keep the baked models there")
    return parser.parse_args()
