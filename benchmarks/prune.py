"""Time and memory of pruning in one call, beside torch's own.

Every measurement runs in a fresh process, which builds a model with random weights of
a different scale in every layer, prunes it once and reports the seconds and the peak
memory above the model's own. Methods:

  identity         prune.identity on every layer: masks of ones, the floor of torch's mechanism
  torch-l1         prune.global_unstructured with L1Unstructured
  straightforward  DIMAP by sorting every layer, the scores handed to prune.global_unstructured
  torch_dimap      global_module_aware_unstructured

Writes prune.csv (every run), prune.md (medians and ratios) and prune.png to --output; on a
GPU prune-cuda.csv and so on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune
from tqdm import tqdm

import torch_dimap

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from provenance import provenance, write_csv  # noqa: E402

SWINS = {
    "Swin-T": "swin_tiny_patch4_window7_224",
    "Swin-S": "swin_small_patch4_window7_224",
    "Swin-B": "swin_base_patch4_window7_224",
    "Swin-L": "swin_large_patch4_window7_224",
}
AMOUNT = 0.5
SCALING_LAYERS = 16
SCALED = ("identity", "torch_dimap")  # what the scaling run compares


# What is done to two float32 layers of 10^6 random weights each: equal magnitudes are those
# that a method could stumble on.
TIES: dict[str, Callable[[torch.Tensor], object]] = {
    "distinct": lambda weight: None,
    "half-equal": lambda weight: weight.view(-1)[::2].fill_(0.01),
    "all-equal": lambda weight: weight.fill_(0.01),
    "rounded": lambda weight: weight.mul_(1000).round_().div_(1000),
}


def identity(groups: dict) -> None:
    for pairs in groups.values():
        for module, name in pairs:
            prune.identity(module, name)


def torch_l1(groups: dict) -> None:
    pairs = [pair for group in groups.values() for pair in group]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=AMOUNT)


def straightforward(groups: dict) -> None:
    for pairs in groups.values():
        scores = {}
        for module, name in pairs:
            weight = getattr(module, name).detach()
            square = weight.flatten().double().square()
            order = square.argsort(descending=True)
            score = torch.empty_like(square)
            score[order] = square[order] / square[order].cumsum(0)
            scores[module, name] = score.view(weight.shape).float()
        prune.global_unstructured(
            pairs, prune.L1Unstructured, importance_scores=scores, amount=AMOUNT
        )


def ours(groups: dict) -> None:
    torch_dimap.global_module_aware_unstructured(groups, amount=AMOUNT)


METHODS = {
    "identity": identity,
    "torch-l1": torch_l1,
    "straightforward": straightforward,
    "torch_dimap": ours,
}


def build(model: str, device: str, seed: int) -> tuple[nn.Module, dict]:
    """Return a model, by timm name, number of bfloat16 weights or kind of ties; and its groups."""
    if model.isdigit() or model in TIES:
        count = SCALING_LAYERS if model.isdigit() else 2
        size = int(model) // count if model.isdigit() else 10**6
        dtype = torch.bfloat16 if model.isdigit() else torch.float32
        layers = [nn.Linear(size, 1, bias=False, dtype=dtype, device=device) for _ in range(count)]
        network: nn.Module = nn.Sequential(*layers)
        groups = {"all": [(layer, "weight") for layer in layers]}
    else:
        import timm

        network = timm.create_model(model).to(device)
        groups = torch_dimap.group_parameters(network)
    generator = torch.Generator(device).manual_seed(seed)
    pairs = [pair for group in groups.values() for pair in group]
    with torch.no_grad():
        for i, (module, name) in enumerate(pairs):
            weight = getattr(module, name)
            weight.normal_(generator=generator).mul_(0.01 * (1 + i % 7))
            TIES.get(model, TIES["distinct"])(weight)
    return network, groups


class PeakMemory:
    """Peak memory of a block above what was held when it began, in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device

    def _status(self, field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.extra = torch.cuda.max_memory_allocated() - self.before
        else:
            self.extra = self._status("VmHWM") - self.before


def measure(model: str, method: str, device: str, seed: int) -> dict:
    """Prune once, in this process."""
    network, groups = build(model, device, seed)
    warm_up, small_groups = build("16000", device, seed)  # loads libraries, starts threads
    METHODS[method](small_groups)
    if device == "cuda":
        torch.cuda.synchronize()
    with PeakMemory(device) as memory:
        start = time.perf_counter()
        METHODS[method](groups)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    prunable = sum(m.weight_orig.numel() for pairs in groups.values() for m, _ in pairs)
    return {"prunable": prunable, "seconds": seconds, "extra_bytes": memory.extra}


def measure_in_fresh_process(model: str, method: str, device: str, seed: int) -> dict:
    job = json.dumps([model, method, device, seed])
    command = [sys.executable, __file__, "--one", job]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"benchmark: {method} on {model} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def medians(rows: list[dict]) -> list[dict]:
    keys = dict.fromkeys((row["model"], row["method"]) for row in rows)
    result = []
    for model, method in keys:
        runs = [row for row in rows if (row["model"], row["method"]) == (model, method)]
        middle = {k: statistics.median(run[k] for run in runs) for k in ("seconds", "extra_bytes")}
        result.append({**runs[0], **middle, "runs": len(runs)})
    return result


def markdown(rows: list[dict]) -> str:
    """Lay the medians out as a table, with ratios to ours and to the floor."""
    lines = [
        f"Medians of {medians(rows)[0]['runs']} runs on {rows[0]['machine']}, torch "
        f"{rows[0]['torch']}, seed {rows[0]['seed']}, commit {rows[0]['commit']}. Command: "
        f"`{rows[0]['command']}`.",
        "",
        "| model | prunable weights | method | seconds | ÷ torch_dimap | ÷ identity "
        "| extra memory, MB | ÷ identity |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    middle = {(row["model"], row["method"]): row for row in medians(rows)}
    for (model, method), row in middle.items():
        own, floor = (middle.get((model, name)) for name in ("torch_dimap", "identity"))
        name = f"{int(model):.0e} in bfloat16" if model.isdigit() else model
        name = f"2 layers of 1e6, {model}" if model in TIES else name
        to_ours = f"{row['seconds'] / own['seconds']:.2f}" if own else ""
        to_floor = f"{row['seconds'] / floor['seconds']:.2f}" if floor else ""
        memory = ""
        if floor and floor["extra_bytes"]:  # none where the process had enough left
            memory = f"{row['extra_bytes'] / floor['extra_bytes']:.2f}"
        lines.append(
            f"| {name} | {row['prunable']:,} | {method} | {row['seconds']:.3f} | {to_ours} "
            f"| {to_floor} | {row['extra_bytes'] / 1e6:,.0f} | {memory} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    middle = medians(rows)
    for i, method in enumerate(METHODS):
        for scaling, style in ((False, "o-"), (True, "s--")):
            points = sorted(
                (row["prunable"], row["seconds"])
                for row in middle
                if row["method"] == method
                and row["model"] not in TIES
                and row["model"].isdigit() == scaling
            )
            if points:
                label = method + (", bfloat16 layers" if scaling else ", timm Swins (float32)")
                axes.loglog(*zip(*points), style, color=f"C{i}", label=label)
    axes.set_xlabel("prunable weights")
    axes.set_ylabel("seconds, median")
    axes.set_title(title, fontsize="medium")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="*", default=list(SWINS), metavar="MODEL",
        help=f"of {', '.join(SWINS)}, or any timm name (default: all four)")  # fmt: skip
    add("--scaling", nargs="*", type=float, default=[1e6, 1e7, 1e8, 1e9], metavar="N",
        help="sizes of the scaling run, bfloat16 weights (default: 1e6 1e7 1e8 1e9)")  # fmt: skip
    add("--ties", nargs="*", choices=TIES, default=list(TIES), metavar="KIND",
        help=f"equal magnitudes in two layers, of {', '.join(TIES)} (default: all)")  # fmt: skip
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS),
        help=f"(default: all; in the scaling run only {' and '.join(SCALED)})")  # fmt: skip
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    add("--repeats", type=int, default=5, help="runs of each (default: 5)")
    add("--seed", type=int, default=0, help="of the random weights (default: 0)")
    add("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR",
        help="(default: benchmarks/results)")  # fmt: skip
    add("--one", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark: --device cuda needs a GPU, and torch finds none.")
    models = [(label, SWINS.get(label, label)) for label in options.models]
    jobs = [(label, model, method) for label, model in models for method in options.methods]
    scaled = [method for method in SCALED if method in options.methods]
    jobs += [(str(int(n)), str(int(n)), method) for n in options.scaling for method in scaled]
    jobs += [(kind, kind, method) for kind in options.ties for method in options.methods]
    origin = provenance(options.device)
    rows = []
    # Round by round, so that a slow spell of the machine touches all methods alike.
    for _ in tqdm(range(options.repeats), desc="rounds"):
        for label, model, method in tqdm(jobs, desc="measurements", leave=False):
            result = measure_in_fresh_process(model, method, options.device, options.seed)
            about = {"device": options.device, "seed": options.seed, "amount": AMOUNT, **origin}
            rows.append({"model": label, "method": method, **result, **about})
    options.output.mkdir(parents=True, exist_ok=True)
    stem = "prune" if options.device == "cpu" else "prune-cuda"
    with open(options.output / f"{stem}.csv", "w", newline="") as file:
        write_csv(rows, file)
    table = markdown(rows)
    (options.output / f"{stem}.md").write_text(table + "\n")
    plot(rows, options.output / f"{stem}.png", f"Pruning {AMOUNT:.0%} once: {origin['machine']}")
    print(table)


if __name__ == "__main__":
    main()
