"""How fast a forward is: dense, with zeros, and with half of the heads and neurons removed.

Models have random weights. Every runtime runs one forward of each method, round by round:

  dense          the model as it is
  masked         half of the weights masked: by torch's hooks in eager, as zeros elsewhere
  slim           half of each layer's heads and neurons removed
  slim, global   half of all heads and of all neurons removed, ranked over all layers
  heads, neurons only half of each layer's heads, or neurons
  torch-pruning  half of each layer's heads and neurons, by Torch-Pruning, where that runs

`--runtimes pruning` times the calls that make a slim model instead. A run measures the
pieces that it is asked for and keeps the others in latency.csv (a line per forward), from
which latency.md (medians, quartiles, medians of the ratios to the dense forward of the same
round) is then made; on a GPU latency-cuda.csv and so on.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from prune import provenance
from runtimes import RUNTIMES, exported
from torch import Tensor, nn
from tqdm import tqdm

import torch_dimap

MODELS = {
    "Swin-T": "swin_tiny_patch4_window7_224",
    "ViT-S": "vit_small_patch16_224",
    "Swin-B": "swin_base_patch4_window7_224",
}
AMOUNT = 0.5


def masked(model: nn.Module, image: Tensor) -> nn.Module:
    torch_dimap.global_module_aware_unstructured(
        torch_dimap.group_parameters(model), amount=AMOUNT
    )
    return model


def slim(*kinds: str, ranked: str = "layer") -> Callable[[nn.Module, Tensor], nn.Module]:
    """Return what removes half of the units of some kinds, of each layer or of all layers."""

    def remove(model: nn.Module, image: Tensor) -> nn.Module:
        found = torch_dimap.group_units(model)
        groups = {kind: found[kind] for kind in kinds}
        if ranked == "layer":
            groups = {x.name + kind: [x] for kind, layers in groups.items() for x in layers}
        torch_dimap.global_module_aware_structured(groups, AMOUNT)
        return torch_dimap.remove_units(model)

    return remove


def torch_pruning(model: nn.Module, image: Tensor) -> nn.Module:
    """Let Torch-Pruning do the same, with the numbers of heads set as its examples set them."""
    import torch_pruning as tp

    attentions = [module for module in model.modules() if hasattr(module, "qkv")]
    mlps = [module.fc1 for module in model.modules() if hasattr(module, "fc1")]
    for attention in attentions:
        attention.fused_attn = False  # it traces the plain products alone
    pruner = tp.pruner.BasePruner(
        model, image[:1], tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.0,
        pruning_ratio_dict={layer: AMOUNT for layer in [*mlps, *(x.qkv for x in attentions)]},
        num_heads={x.qkv: x.num_heads for x in attentions}, prune_num_heads=True,
        prune_head_dims=False, head_pruning_ratio=AMOUNT,
    )  # fmt: skip
    pruner.step()
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.attn_dim = attention.qkv.out_features // 3
        attention.head_dim = attention.attn_dim // attention.num_heads
        attention.fused_attn = True
    return model


METHODS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "dense": lambda model, image: model,
    "masked": masked,
    "slim": slim("heads", "neurons"),
    "slim, global": slim("heads", "neurons", ranked="all"),
    "heads": slim("heads"),
    "neurons": slim("neurons"),
    "torch-pruning": torch_pruning,
}


def measure(label: str, batch: int, runtime: str, options: argparse.Namespace) -> list[dict]:
    """Return a row for every forward of one model, batch and runtime."""
    forwards, about, rows = {}, {}, []
    base = {"model": label, "batch": batch, "runtime": runtime, "dtype": options.dtype}
    for method in tqdm(options.methods, desc=f"{label}, batch {batch}, {runtime}: building"):
        torch.manual_seed(options.seed)
        model = timm.create_model(MODELS.get(label, label)).eval()
        size = timm.data.resolve_model_data_config(model)["input_size"]
        images = torch.randn(batch, *size)
        file = options.cache / f"{label}-{method}-{batch}.onnx".replace(", ", "-")
        try:
            model = METHODS[method](model, images)
            count = torch_dimap.count_flops(model, images[:1]).dense
            model = model.to(options.device, getattr(torch, options.dtype))
            images = images.to(options.device, getattr(torch, options.dtype))
            with torch.inference_mode():
                model(images)
            if options.export_only:
                exported(model, images, file)
                continue
            forwards[method] = RUNTIMES[runtime](model, images, file)
            for _ in range(2):  # plans, allocates and compiles
                seconds(forwards[method], options.device)
        except Exception as error:  # other tools and runtimes raise many kinds
            if runtime == "eager" and method != "torch-pruning":
                raise
            forwards.pop(method, None)
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:160]
            rows.append({**base, "method": method, "error": reason})
            continue
        size = sum(p.numel() for p in model.parameters())
        about[method] = {"multiply_adds": count, "parameters": size}
    for i in tqdm(range(options.rounds), desc="rounds"):
        for method, forward in forwards.items():
            rows.append({**base, "method": method, **about[method], "round": i,
                         "seconds": seconds(forward, options.device)})  # fmt: skip
    return rows


def seconds(forward: Callable[[], object], device: str) -> float:
    with torch.inference_mode():
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        forward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure_pruning(label: str, options: argparse.Namespace) -> list[dict]:
    """Return how long the three calls take that make a slim model of a dense one."""
    rows = []
    for i in tqdm(range(options.rounds), desc=f"{label}: pruning"):
        torch.manual_seed(options.seed)
        model = timm.create_model(MODELS.get(label, label)).to(options.device)
        base = {"model": label, "runtime": "pruning", "method": "slim, global", "round": i}
        call = METHODS["slim, global"]
        rows.append({**base, "seconds": seconds(lambda: call(model, None), options.device)})
    return rows


FIELDS = ["model", "batch", "runtime", "dtype", "method", "round", "seconds", "multiply_adds",
          "parameters", "error", "machine", "torch", "timm", "seed"]  # fmt: skip


def merge(path: Path, rows: list[dict]) -> list[dict]:
    """Return the rows of the file, those of the pieces measured anew replaced."""
    rows = [{field: str(row.get(field, "")) for field in FIELDS} for row in rows]
    before: list[dict] = []
    if path.exists():
        with open(path, newline="") as file:
            before = list(csv.DictReader(file))
    fresh = {piece(row) for row in rows}
    order = [*MODELS, "1", "4", "8", "16", "eager", "compile", "onnxruntime", "openvino", "pruning"]
    place = {name: i for i, name in enumerate(order)}
    merged = [row for row in before if piece(row) not in fresh] + rows
    return sorted(merged, key=lambda row: [place.get(x, len(place)) for x in piece(row)[:3]])


def piece(row: dict) -> tuple[str, ...]:
    return tuple(row[key] for key in ("model", "batch", "runtime", "dtype"))


def markdown(rows: list[dict]) -> str:
    first = rows[0]
    lines = [
        f"{AMOUNT:.0%} pruned; medians, in brackets the quartiles, and the medians of the ratios "
        f"to the dense forward of the same round, on {first['machine']}, torch {first['torch']}, "
        f"timm {first['timm']}, seed {first['seed']}. Multiply-adds are those of one image.",
        "",
        "| model | batch | runtime | method | parameters, M | multiply-adds, G | milliseconds "
        "| times faster |",
        "|---|---:|---|---|---:|---:|---:|---:|",
    ]
    for key in dict.fromkeys(map(piece, rows)):
        same = [row for row in rows if piece(row) == key]
        times = {
            method: [float(row["seconds"]) for row in same if row["method"] == method]
            for method in dict.fromkeys(row["method"] for row in same if row["seconds"])
        }
        label = f"| {key[0]} | {key[1]} | {key[2]}{'' if key[3] != 'float16' else ', float16'}"
        for row in {row["method"]: row for row in same}.values():
            if row["error"]:
                lines.append(f"{label} | {row['method']} | | | {row['error']} | |")
                continue
            own = times[row["method"]]
            low, middle, high = (1e3 * x for x in statistics.quantiles(own, n=4))
            ratios = [a / b for a, b in zip(times.get("dense", []), own)]
            lines.append(
                f"{label} | {row['method']} | {mega(row['parameters'], 1e6)} "
                f"| {mega(row['multiply_adds'], 1e9)} | {middle:.1f} ({low:.1f}–{high:.1f}) "
                f"| {f'{statistics.median(ratios):.2f}' if ratios else ''} |"
            )
    return "\n".join(lines)


def mega(number: str, unit: float) -> str:
    return f"{float(number) / unit:.2f}" if number else ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["Swin-T", "ViT-S"], metavar="MODEL",
        help=f"of {', '.join(MODELS)}, or any timm name (default: Swin-T ViT-S)")  # fmt: skip
    add("--batch-sizes", type=int, nargs="+", default=[1, 16], metavar="N", help="(default: 1 16)")
    add("--runtimes", nargs="+", choices=[*RUNTIMES, "pruning"], default=["eager"],
        help="(default: eager)")  # fmt: skip
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=f"of {'; '.join(METHODS)} (default: all)")  # fmt: skip
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32",
        help="(default: float32)")  # fmt: skip
    add("--rounds", type=int, default=15, metavar="N", help="forwards of each (default: 15)")
    add("--seed", type=int, default=0, help="of weights and images (default: 0)")
    add("--cache", type=Path, default=Path("build/latency"), metavar="DIR",
        help="where exported models lie, to be used again (default: build/latency)")  # fmt: skip
    add("--export-only", action="store_true", help="fill --cache, and measure nothing")
    add("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR",
        help="(default: benchmarks/results)")  # fmt: skip
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("latency: --device cuda needs a GPU, and torch finds none.")
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, found {options.rounds}")
    return options


def main() -> None:
    options = parse()
    machine = provenance(options.device)["machine"]
    about = {"machine": machine, "torch": torch.__version__, "timm": timm.__version__,
             "seed": options.seed}  # fmt: skip
    rows: list[dict] = []
    for label in options.models:
        for runtime in options.runtimes:
            if runtime == "pruning":
                rows += measure_pruning(label, options)
                continue
            for batch in options.batch_sizes:
                rows += measure(label, batch, runtime, options)
    if options.export_only:
        return
    rows = [{**row, **about} for row in rows]
    options.output.mkdir(parents=True, exist_ok=True)
    stem = "latency" if options.device == "cpu" else "latency-cuda"
    rows = merge(options.output / f"{stem}.csv", rows)
    with open(options.output / f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    (options.output / f"{stem}.md").write_text(markdown(rows) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
