"""Train, prune, refit, fine-tune, save and reload a small Swin on handwritten digits.

Downloads nothing: scikit-learn ships the 1797 images. The Swin (0.5 million weights) is
trained from scratch, then pruned with DIMAP and, beside it, uniformly (the same share of
the smallest weights of every layer); of another copy whole heads and neurons are removed. One
table shows top-1 right after that, with what is left refitted on unlabelled images, and after
fine-tuning. It says how long it will take before it begins.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
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

BATCH = 32
UNLABELLED = 256  # images to refit what is kept on
METHODS = ("DIMAP", "uniform", "units removed")
TOP1 = ("dense", "one-shot", "refitted", "fine-tuned")


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
        img_size=16, patch_size=2, in_chans=1, num_classes=10, window_size=2,
        embed_dim=64, depths=(2, 2), num_heads=(2, 4),
    )  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float) -> None:
    """Train with AdamW and a cosine schedule on randomly shifted images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc="training", leave=False, mininterval=0.5) as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(BATCH):
                shifted = F.pad(images[batch], (1, 1, 1, 1), value=-1.0)
                top, left = torch.randint(0, 3, (2,)).tolist()
                outputs = model(shifted[:, :, top : top + 16, left : left + 16])
                loss = F.cross_entropy(outputs, labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


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
    if method == "units removed":  # heads among heads, neurons among neurons
        units = torch_dimap.group_units(model)
        torch_dimap.global_module_aware_structured(units, amount=amount)
        return
    groups = torch_dimap.group_parameters(model)
    if method == "uniform":  # every layer a group of its own
        groups = {f"{g}.{i}": [pair] for g, pairs in groups.items() for i, pair in enumerate(pairs)}
    torch_dimap.global_module_aware_unstructured(groups, amount=amount)


def finish(model: nn.Module, method: str, path: Path) -> nn.Module:
    """Make what is gone permanent and carry the model through a file into a fresh one."""
    if method == "units removed":
        torch_dimap.save_pruned(torch_dimap.remove_units(model), path, force=True)
        return torch_dimap.load_pruned(build_model(), path)
    save_file(torch_dimap.remove_all(model).state_dict(), path)
    fresh = build_model()
    fresh.load_state_dict(load_file(path))
    return fresh


def run(seed: int, options: argparse.Namespace, folder: Path) -> list[dict]:
    """Do all of it for one seed; return a row of figures for each amount and method."""
    torch.manual_seed(seed)
    train_images, test_images, train_labels, test_labels = load_data()
    dense = build_model()
    train(dense, train_images, train_labels, options.epochs, lr=1e-3)
    dense_top1 = top1(dense, test_images, test_labels)
    print(f"seed {seed}: dense top-1 {dense_top1:.2f} %")
    whole = torch_dimap.summarize(dense, test_images[:1]).model
    rows = []
    for method, amount in planned(options):
        model = copy.deepcopy(dense)
        prune(model, method, amount)
        one_shot = top1(model, test_images, test_labels)
        torch_dimap.reconstruct(model, train_images[:UNLABELLED].split(BATCH))
        refitted = top1(model, test_images, test_labels)
        train(model, train_images, train_labels, options.finetune_epochs, lr=3e-4)
        name = f"swin_digits_{method.lower()}_{amount:.2f}_seed{seed}.safetensors"
        model = finish(model, method, folder / name.replace(" ", "_"))
        left = torch_dimap.summarize(model, test_images[:1]).model
        rows.append({
            "amount": amount, "method": method, "dense": dense_top1, "one-shot": one_shot,
            "refitted": refitted, "fine-tuned": top1(model, test_images, test_labels),
            "parameters kept": 100 * (left.weights - left.zeros) / whole.weights,
            "masked FLOPs kept": 100 * left.flops.masked / whole.flops.dense,
            "computed FLOPs": 100 * left.flops.dense / whole.flops.dense,
        })  # fmt: skip
    return rows


def planned(options: argparse.Namespace) -> list[tuple[str, float]]:
    """List the rows: methods and amounts."""
    rows = [(method, amount) for amount in options.amounts for method in METHODS[:2]]
    return rows + [(METHODS[2], amount) for amount in options.units]


def announce(options: argparse.Namespace) -> None:
    """Say how long all of it will take, by a few steps on this machine."""
    images, _, labels, _ = load_data()
    model = build_model()
    start = time.perf_counter()
    train(model, images[: 4 * BATCH], labels[: 4 * BATCH], epochs=2, lr=1e-3)
    step = (time.perf_counter() - start) / 8
    rows = len(planned(options))
    steps = -(-len(images) // BATCH) * (options.epochs + rows * options.finetune_epochs)
    # Refitting and counting a row take some thirty steps' time.
    seconds = len(options.seeds) * step * (steps + 30 * rows)
    print(f"{len(options.seeds) * steps:,} training steps: about {seconds:.0f} s on this machine, "
          f"on {torch.get_num_threads()} thread(s).", flush=True)  # fmt: skip


def print_table(rows: list[dict]) -> None:
    """Print the mean over the seeds and, for top-1, the lowest and the highest."""
    figures = [key for key in rows[0] if key not in ("amount", "method")]
    lines = [["amount", "method", *figures]]
    for amount, method in dict.fromkeys((row["amount"], row["method"]) for row in rows):
        same = [row for row in rows if (row["amount"], row["method"]) == (amount, method)]
        line = [f"{amount:.0%}", method]
        for key in figures:
            values = [row[key] for row in same]
            text = f"{statistics.mean(values):.2f}"
            if len(values) > 1 and key in TOP1:
                text += f" ({min(values):.2f}-{max(values):.2f})"
            line.append(text)
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))
    print(
        "All figures in %. Top-1 is on test images: dense, right after pruning, with the kept\n"
        f"weights refitted on {UNLABELLED} unlabelled images, and after fine-tuning. Masked FLOPs\n"
        "weight layers by density and are theoretical: dense kernels do not run faster on zeros.\n"
        "Computed FLOPs are what remains to be done: less only where units are removed."
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--amounts", type=float, nargs="+", default=[0.8, 0.9], metavar="A",
        help="fractions of the prunable weights (default: 0.8 0.9)")  # fmt: skip
    add("--units", type=float, nargs="*", default=[0.5], metavar="A",
        help="fractions of the heads and of the neurons (default: 0.5)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0], metavar="S", help="(default: 0)")
    add("--epochs", type=int, default=16, help="of dense training (default: 16)")
    add("--finetune-epochs", type=int, default=2, help="after pruning (default: 2)")
    add("--threads", type=int, default=1, metavar="N",
        help="of torch; more are slower where a core is busy, since every small operation waits "
        "for all of them (default: 1)")  # fmt: skip
    add("--output", type=Path, metavar="DIR", help="keep the baked models there")
    options = parser.parse_args()
    if not all(0 <= amount <= 1 for amount in options.amounts + options.units):
        parser.error("--amounts and --units must lie between 0 and 1")
    if min(options.epochs, options.finetune_epochs, options.threads) < 1:
        parser.error("--epochs, --finetune-epochs and --threads must be at least 1")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    announce(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for seed in options.seeds for row in run(seed, options, folder)]
    print_table(rows)
    if options.output:
        print(f"The models, for load_state_dict or load_pruned: {options.output}")


if __name__ == "__main__":
    main()
