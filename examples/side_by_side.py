"""The methods of this package side by side: top-1 at equal cost, and what it took to get there.

For each checkpoint, one for each seed, and each share of the dense multiply-adds: DIMAP's
zeros, units by the data-free score, X-Pruner-style and SPViT, all with the same number of
training epochs in all, whatever they are for; and a narrower model, trained from scratch.

    python examples/side_by_side.py --checkpoints A B C --epochs 6 --output DIR --name NAME \\
        --narrow 0.5:embed_dim=72 --scratch-epochs 18 -- MODEL --data FOLDER ...

What comes after -- goes to all scripts that train. Writes NAME.csv, NAME.md and NAME.png to
--results; the runs themselves are in --output, and finished ones are not done again. Times
are always taken anew, in turns, so run it on an idle machine, or first with --rounds 0.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import tempfile
from pathlib import Path

import finetune
import spvit
import steps
import torch
import xpruner
from models import fail, whole_or_not_at_all
from provenance import write_csv
from speed import spread, take_times
from tables import as_table, top1
from torch import nn
from tqdm import tqdm

import torch_dimap

# Method -> whether it needs labels besides those of fine-tuning, and how it is drawn.
METHODS = {
    "dense": ("", "k*"),
    "DIMAP, zeros": ("no", "C0o-"),
    "units, data-free score": ("no", "C2s-"),
    "X-Pruner-style": ("yes", "C3D-"),
    "SPViT": ("yes", "C4^-"),
    "narrower, from scratch": ("", "C7v-"),
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoints", type=Path, nargs="+", required=True, metavar="FILE",
        help="the dense weights, a file for each seed")
    add("--targets", type=float, nargs="+", default=[0.65, 0.5], metavar="T",
        help="shares of the dense multiply-adds (default: 0.65 0.5)")
    add("--epochs", type=int, default=6, metavar="N",
        help="of training for every method but the last (default: 6)")
    add("--lr", type=float, default=1e-4, metavar="LR", help="of weights (default: 1e-4)")
    add("--gate-lr", type=float, default=1e-2, metavar="LR", help="of gates (default: 1e-2)")
    add("--narrow", nargs="*", default=[], metavar="T:KEY=VALUE,...",
        help="for a target, what of the model to change to be as dear when trained from scratch, "
        "such as 0.5:embed_dim=72,mlp_ratio=3")
    add("--scratch-epochs", type=int, default=18, metavar="N",
        help="for these: as many as the dense model was trained for, and --epochs (default: 18)")
    add("--scratch-lr", type=float, default=2e-3, metavar="LR", help="(default: 2e-3)")
    add("--seed", type=int, default=0, help="of the first checkpoint, counted up (default: 0)")
    add("--rounds", type=int, default=51, metavar="N",
        help="forwards of each model; 0 leaves the times out (default: 51)")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder of the runs")
    add("--results", type=Path, default=Path("examples/results"), metavar="DIR",
        help="(default: examples/results)")
    add("--name", default="side_by_side", help="of the files (default: side_by_side)")
    add("words", nargs=argparse.REMAINDER, metavar="-- ...", help="model, data and the like")
    options = parser.parse_args(words)
    options.words = [word for word in options.words if word != "--"]
    narrow = [item.partition(":") for item in options.narrow]
    options.narrow = {float(target): changes for target, _, changes in narrow}
    if not set(options.narrow) <= set(options.targets):
        parser.error(f"--narrow must be for --targets, found {sorted(options.narrow)}")
    if options.epochs < 3:
        parser.error(f"--epochs must be at least 3, one for each step, found {options.epochs}")
    return options


def split(epochs: int, *shares: int) -> list[int]:
    """Share epochs out in proportion, at least one each; the last gets what is left."""
    parts = [max(1, epochs * share // sum(shares)) for share in shares[:-1]]
    return [*parts, epochs - sum(parts)]


def dimap(dense: nn.Module, image: torch.Tensor, target: float) -> float:
    """Return the amount of weights that theoretically leaves the share of the multiply-adds."""
    return next(iter(torch_dimap.prune_to_flops(dense, image, target).amount.values()))


def units(dense: nn.Module, image: torch.Tensor, target: float) -> float:
    """Return the amount of units that leaves the share of the multiply-adds."""
    return max(torch_dimap.prune_units_to_flops(dense, image, target).amount.values())


def tuned(
    options: argparse.Namespace, folder: Path, seed: int, method: str, amount: float
) -> nn.Module:
    """Prune and fine-tune by finetune.py; return the model as it would be deployed."""
    run_finetune(options, folder, [
        "--checkpoint", checkpoint(options, seed), "--method", method, "--amount", amount,
        "--epochs", options.epochs, "--warmup-epochs", 0, "--lr", options.lr, "--min-lr", 0,
        "--seed", seed,
    ])  # fmt: skip
    _, _, model = dense_of(options, seed)
    if method == "units":  # the baked model tells which units are gone
        torch_dimap.load_pruned(model, folder / "model.safetensors")
        return torch_dimap.remove_units(model)
    return torch_dimap.load_pruned(model, folder / "model.safetensors")


def run_finetune(options: argparse.Namespace, folder: Path, more: list) -> None:
    if not (folder / "model.safetensors").is_file():
        resume = ["--resume"] if (folder / "last.pth").is_file() else []
        words = [*options.words, "--output", folder, *more, *resume]
        finetune.run(finetune.parse(list(map(str, words))))


def in_steps(
    options: argparse.Namespace, script, folder: Path, seed: int, target: float, *more
) -> nn.Module:
    """Run a script that trains in steps; return the model that it ends in."""
    words = [*options.words, "--checkpoint", checkpoint(options, seed), "--output", folder,
             "--target", target, "--seed", seed, "--resume", *more]  # fmt: skip
    job = script.run(script.parse(list(map(str, words))))
    return script.models_of(job)["fine-tuned"]


def checkpoint(options: argparse.Namespace, seed: int) -> Path:
    return options.checkpoints[seed - options.seed]


def dense_of(options: argparse.Namespace, seed: int) -> tuple[steps.Job, torch.Tensor, nn.Module]:
    """Return the data, one image, and the dense model of a seed."""
    words = [*options.words, "--checkpoint", checkpoint(options, seed), "--output", "none",
             "--seed", seed]  # fmt: skip
    job = steps.open_job(spvit.STEPS, spvit.parse(list(map(str, words))))
    model = steps.build(job.options, job.classes).eval()
    return job, job.test[0][0][None].to(job.options.device), model


def narrow(options: argparse.Namespace, folder: Path, seed: int, changes: str) -> nn.Module:
    """Train a narrower model from scratch."""
    words = options.words.copy()
    at = words.index("--model-kwargs") + 1 if "--model-kwargs" in words else len(words)
    kwargs = changes.split(",")
    words[at:at] = kwargs if "--model-kwargs" in words else ["--model-kwargs", *kwargs]
    keys = {word.split("=")[0] for word in kwargs}
    words = [word for i, word in enumerate(words)
             if not (i >= at + len(kwargs) and word.split("=")[0] in keys)]  # fmt: skip
    changed = argparse.Namespace(**{**vars(options), "words": words})
    run_finetune(changed, folder, [
        "--random-init", "--amount", 0, "--epochs", options.scratch_epochs, "--warmup-epochs", 1,
        "--lr", options.scratch_lr, "--warmup-lr", options.scratch_lr / 100, "--min-lr",
        options.scratch_lr / 100, "--weight-decay", 0.05, "--seed", seed,
    ])  # fmt: skip
    parsed = finetune.parse([*map(str, words), "--random-init", "--amount", "0", "--output", "no"])
    job, _, _ = dense_of(options, seed)
    model = steps.build(parsed, job.classes)
    return torch_dimap.load_pruned(model, folder / "model.safetensors")


def models_of(options: argparse.Namespace, seed: int, bar: tqdm) -> list[tuple[dict, nn.Module]]:
    """Return the models of a seed, each with what is known of how it was made."""
    job, image, dense = dense_of(options, seed)
    base = options.output / f"seed{seed}"
    made = [({"method": "dense", "target": 1.0, "epochs": 0}, dense)]
    bar.update()
    for target in options.targets:
        at = base / f"{target:g}"
        masks, rates, rest = split(options.epochs, 1, 1, 1)
        search, after = split(options.epochs, 1, 1)
        ways = {
            "DIMAP, zeros": lambda: tuned(
                options, at / "dimap", seed, "dimap", dimap(copy.deepcopy(dense), image, target)
            ),
            "units, data-free score": lambda: tuned(
                options, at / "units", seed, "units", units(copy.deepcopy(dense), image, target)
            ),
            "X-Pruner-style": lambda: in_steps(
                options, xpruner, at / "xpruner", seed, target, "--mask-epochs", masks,
                "--rate-epochs", rates, "--tune-epochs", rest, "--rate-lr", options.lr,
                "--tune-lr", options.lr, "--probe-images", 0,
            ),
            "SPViT": lambda: in_steps(
                options, spvit, at / "spvit", seed, target, "--search-epochs", search,
                "--tune-epochs", after, "--search-lr", options.lr, "--gate-lr", options.gate_lr,
                "--tune-lr", options.lr,
            ),
        }
        folders = dict(zip(ways, ("dimap", "units", "xpruner", "spvit")))
        changes = options.narrow.get(target)
        if changes:
            ways["narrower, from scratch"] = lambda: narrow(options, at / "narrow", seed, changes)
            folders["narrower, from scratch"] = "narrow"
        for method, make in ways.items():
            model = make().eval()
            made.append(({"method": method, "target": target,
                          **training_of(at / folders[method], len(job.train))}, model))
            bar.update()
    return made


def training_of(folder: Path, images: int) -> dict:
    """Say how long a run has trained, and what for."""
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = sum(images / float(row["images_per_second"]) for row in rows)
    return {"epochs": len(rows), "training_seconds": round(seconds, 1)}


def measured(known: dict, model: nn.Module, image: torch.Tensor, job: steps.Job) -> dict:
    """Return a row of figures of a model."""
    count = torch_dimap.count_flops(model, image)
    return {
        **known, "top1": top1(model, job.test, job.options),
        "parameters": sum(p.numel() for p in model.parameters()),
        "theoretical": count.masked, "counted": count.dense, "bytes": file_size(model),
    }  # fmt: skip


def file_size(model: nn.Module) -> int:
    """Return how many bytes a model's file has, with zeros left out where that is smaller."""
    model = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        groups = torch_dimap.group_parameters(model)
        if any(not getattr(m, name).all() for pairs in groups.values() for m, name in pairs):
            scores = {(m, name): getattr(m, name) for pairs in groups.values() for m, name in pairs}
            zeros = {group: sum(int((scores[pair] == 0).sum()) for pair in pairs)
                     for group, pairs in groups.items()}  # fmt: skip
            torch_dimap.global_module_aware_unstructured(groups, amount=zeros)
            torch_dimap.save_pruned(model, path)
            return path.stat().st_size
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def write_up(rows: list[dict], options: argparse.Namespace) -> str:
    """Lay out the means over the seeds."""
    kinds: dict[tuple[float, str], list[dict]] = {}
    for row in rows:
        kinds.setdefault((row["target"], row["method"]), []).append(row)
    table = []
    for (target, method), same in kinds.items():
        timed = {f"ms, batch {n}": spread([r[f"milliseconds_{n}"] for r in same], 2)
                 for n in (1, 16) if options.rounds}  # fmt: skip
        table.append({
            "method": method, "multiply-adds asked for": f"{target:.0%}",
            "top-1": spread([r["top1"] for r in same], 2),
            "parameters, M": spread([r["parameters"] / 1e6 for r in same], 3),
            "theoretical multiply-adds, M": spread([r["theoretical"] / 1e6 for r in same], 2),
            "counted multiply-adds, M": spread([r["counted"] / 1e6 for r in same], 2),
            **timed,
            "file, MB": spread([r["bytes"] / 1e6 for r in same], 2),
            "epochs": spread([r["epochs"] for r in same], 0),
            "seconds of training": spread([r["training_seconds"] for r in same], 0)
            if "training_seconds" in same[0] else "",
            "labels to choose": METHODS[method][0],
        })  # fmt: skip
    about = rows[0]
    return "\n".join([
        f"Means over {len(options.checkpoints)} seeds, in brackets the lowest and the highest. "
        "Theoretical: every layer weighted by its own density. Counted: what is computed. "
        "Milliseconds: median forwards, in turns.", "", as_table(table), "",
        f"`{about['command']}`, on {about['machine']}, torch {about['torch']}, timm "
        f"{about['timm']}, commit {about['commit']}.", "",
    ])  # fmt: skip


def plot(rows: list[dict], path: Path) -> None:
    """Draw top-1 against the measured time of a batch of 16."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, (_, style) in METHODS.items():
        kinds: dict[float, list[dict]] = {}
        for row in rows:
            if row["method"] == method:
                kinds.setdefault(row["target"], []).append(row)
        if kinds:
            points = [(statistics.mean(r["milliseconds_16"] for r in same),
                       statistics.mean(r["top1"] for r in same),
                       statistics.stdev(r["top1"] for r in same) if len(same) > 1 else 0.0)
                      for same in kinds.values()]  # fmt: skip
            x, y, error = zip(*sorted(points))
            colour = style[:2] if style[0] == "C" else style[0]
            axes.errorbar(x, y, error, fmt=style.removeprefix(colour), color=colour, label=method,
                          capsize=3, markersize=7)  # fmt: skip
    axes.set(xlabel="milliseconds for 16 images, median forward", ylabel="top-1, %")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small")
    with whole_or_not_at_all(path) as file:
        figure.savefig(file, format="png", dpi=150)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    rows, models = [], []
    seeds = range(options.seed, options.seed + len(options.checkpoints))
    total = len(seeds) * (1 + len(options.targets) * 4 + len(options.narrow))
    with tqdm(total=total, unit="model") as bar:
        for seed in seeds:
            job, image, _ = dense_of(options, seed)
            for known, model in models_of(options, seed, bar):
                rows.append({"seed": seed, **measured(known, model, image, job), **job.about})
                models.append(model.eval())
    timed = argparse.Namespace(rounds=options.rounds, device=job.options.device)
    for n in (1, 16) if options.rounds else ():
        images = image.repeat(n, 1, 1, 1)
        for row, times in zip(rows, take_times(models, images, timed)):
            row[f"milliseconds_{n}"] = round(1e3 * statistics.median(times), 3)
    options.results.mkdir(parents=True, exist_ok=True)
    with whole_or_not_at_all(options.results / f"{options.name}.csv", "w") as file:
        write_csv(rows, file)
    text = write_up(rows, options)
    with whole_or_not_at_all(options.results / f"{options.name}.md", "w") as file:
        file.write(text)
    if options.rounds:
        plot(rows, options.results / f"{options.name}.png")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(str(error).strip().splitlines()[-1])
