"""Compare class masks with other scores, and learned rates with simple ones, at equal cost.

For each checkpoint, one for each seed: the class masks are learned once and tested as an
explanation; then every arm, a score and how it becomes rates, prunes the dense model to the
same counted multiply-adds and is fine-tuned. All arms take the same number of epochs: what
an arm does not need to learn its rates, it is fine-tuned longer. Learned rates meet the target
as nearly as whole units allow; the arms after the first are cut to what that one kept.

    python examples/compare_xpruner.py --checkpoints A B C --output DIR --name NAME -- \\
        MODEL --data FOLDER ...

What comes after -- goes to xpruner.py. Writes NAME.csv, NAME_deletion.csv and NAME.md to
--results; the runs themselves are in --output, and finished ones are not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

import steps
import torch
import xpruner
from faithfulness import deletion, leakage, probe_loader, summarize_deletion
from images import only_classes
from models import fail, whole_or_not_at_all
from provenance import write_csv
from safetensors.torch import load_file
from tables import as_table, results, top1
from tqdm import tqdm

import torch_dimap
from torch_dimap.learning import ClassMasks

ARMS = ["masks,learned", "dimap,learned", "masks,layer", "masks,kind", "dimap,layer", "dimap,kind",
        "norm,layer", "taylor,layer", "random,layer"]  # fmt: skip
FEW_ARMS = ["masks,layer", "all_masks,layer", "dimap,layer", "taylor,layer", "random,layer"]

FIGURES = "figures.json"  # what a finished run has found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoints", type=Path, nargs="+", required=True, metavar="FILE",
        help="the dense weights, a file for each seed")
    add("--arms", nargs="+", default=ARMS, metavar="SCORE,RATES",
        help=f"(default: {' '.join(ARMS)})")
    add("--tuned", nargs="*", default=None, metavar="SCORE,RATES",
        help="which of them are fine-tuned, too (default: all)")
    add("--few", type=int, nargs="*", default=[], metavar="N",
        help="also prune for N classes, drawn by the seed; of their images alone")
    add("--few-arms", nargs="+", default=FEW_ARMS, metavar="SCORE,RATES",
        help=f"(default: {' '.join(FEW_ARMS)})")
    add("--few-tuned", nargs="*", default=None, metavar="SCORE,RATES",
        help="which of them are fine-tuned, too (default: all)")
    add("--few-target", type=float, default=0.4, metavar="A",
        help="the share of the multiply-adds to keep for them (default: 0.4)")
    add("--seed", type=int, default=0, help="of the first checkpoint, counted up (default: 0)")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder of the runs")
    add("--results", type=Path, default=Path("examples/results"), metavar="DIR",
        help="(default: examples/results)")
    add("--name", default="xpruner", help="of the files (default: xpruner)")
    add("words", nargs=argparse.REMAINDER, metavar="-- ...", help="options of xpruner.py")
    options = parser.parse_args()
    options.words = [word for word in options.words if word != "--"]
    options.tuned = options.arms if options.tuned is None else options.tuned
    options.few_tuned = options.few_arms if options.few_tuned is None else options.few_tuned
    wrong = [arm for arm in (*options.arms, *options.few_arms) if arm.count(",") != 1]
    if wrong:
        parser.error(f"an arm is a score and its rates, such as masks,learned; found {wrong[0]}")
    return options


def run_step(options: argparse.Namespace, folder: Path, seed: int, *more: object) -> steps.Job:
    """Run xpruner.py in this process, as far as its folder does not hold the results already."""
    own = ["--checkpoint", options.checkpoints[seed - options.seed], "--output", folder,
           "--seed", seed, "--resume", *more]  # fmt: skip
    return xpruner.run(xpruner.parse([*options.words, *map(str, own)]))


def keep(folder: Path, found: dict) -> dict:
    """Write what was found to a folder, for a second call."""
    with whole_or_not_at_all(folder / FIGURES, "w") as file:
        json.dump(found, file)
    return found


def run_arm(
    options: argparse.Namespace, arm: str, target: float, classes: list[int], seed: int,
    dense: float,
) -> dict:  # fmt: skip
    """Prune, and fine-tune, with one score and one kind of rates; return a row of figures."""
    score, rates = arm.split(",")
    tuned = arm in (options.few_tuned if classes else options.tuned)
    folder = options.output / f"seed{seed}" / f"{len(classes) or 'all'}-{score}-{rates}"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FIGURES).is_file():
        return json.loads((folder / FIGURES).read_text())
    for name in ("masks.pth", "masks.safetensors"):
        shutil.copyfile(options.output / f"seed{seed}" / "masks" / name, folder / name)
    more = ["--scores", score, "--rates", rates, "--target", target]
    if classes:
        more += ["--classes", *classes]
    job = run_step(options, folder, seed, "--step", "rates", *more)
    spent = 0
    if rates == "learned":
        state = torch.load(folder / "rates.pth", weights_only=True)
        spent = state["epochs_done"]
    epochs = job.options.rate_epochs + job.options.tune_epochs - spent
    if tuned:
        job = run_step(options, folder, seed, "--step", "tune", "--tune-epochs", epochs, *more)
    models = {name: model for name, model in xpruner.models_of(job).items() if name != "dense"}
    found = {row["model"]: row for row in results(models, job.test, job.options)}
    return keep(folder, {
        "seed": seed, "classes": " ".join(map(str, classes)) or "all", "scores": score,
        "rates": rates, "target": target,
        "share": found["pruned"]["multiply-adds, M"] / multiply_adds(job),
        "dense": dense, "one_shot": found["pruned"]["top1"],
        "fine_tuned": found["fine-tuned"]["top1"] if tuned else "",
        "rate_epochs": spent, "tune_epochs": epochs if tuned else "", **job.about,
    })  # fmt: skip


def compare(options: argparse.Namespace, seed: int, job: steps.Job) -> list[dict]:
    """Return a row for every arm, of all classes and of few."""
    rows: list[dict] = []
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(job.classes, generator=generator).tolist()
    plans = [([], options.arms, job.options.target)]
    plans += [(sorted(drawn[:n]), options.few_arms, options.few_target) for n in options.few]
    bar = tqdm(total=sum(len(arms) for _, arms, _ in plans), desc=f"seed {seed}", unit="arm")
    with bar:
        for classes, arms, target in plans:
            test = only_classes(job.test, classes) if classes else job.test
            dense = top1(steps.build(job.options, job.classes), test, job.options)
            for i, arm in enumerate(arms):
                row = run_arm(options, arm, target, classes, seed, dense)
                rows.append(row)
                if i == 0:
                    target = row["share"]
                bar.update()
    return rows


def multiply_adds(job: steps.Job) -> float:
    """Return the millions of them that the dense model takes for an image."""
    image = job.test[0][0][None].to(job.options.device)
    return torch_dimap.count_flops(steps.build(job.options, job.classes), image).dense / 1e6


def explain(seed: int, job: steps.Job) -> dict:
    """Test the masks of a seed as an explanation."""
    folder = job.options.output
    if (folder / FIGURES).is_file():
        return json.loads((folder / FIGURES).read_text())
    model = steps.build(job.options, job.classes).eval()
    loader = probe_loader(job.test, job.options)
    with ClassMasks(model, torch_dimap.group_units(model), job.classes) as masks:
        masks.load_state_dict(load_file(job.file("masks"), device=job.options.device))
        leaks = leakage(model, masks, loader, job.options)
    rows = deletion(model, masks, loader, job.options)
    rows = [{"seed": seed, **row, **job.about} for row in rows]
    return keep(folder, {"leakage": leaks, "deletion": rows})


def spread(values: list[float]) -> str:
    """Return the mean, and the standard error of several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def write_up(rows: list[dict], leaks: list[dict], falls: list[dict], seeds: int) -> str:
    """Lay out the means over the seeds."""
    table = []
    known = {key: None for row in rows for key in [(len(row["classes"].split())
             if row["classes"] != "all" else "all", row["scores"], row["rates"])]}  # fmt: skip
    for classes, scores, rates in known:
        same = [r for r in rows if (r["scores"], r["rates"]) == (scores, rates) and classes ==
                ("all" if r["classes"] == "all" else len(r["classes"].split()))]  # fmt: skip
        tuned = [r["fine_tuned"] for r in same if r["fine_tuned"] != ""]
        table.append({
            "classes": classes, "scores": scores, "rates": rates,
            "share of the multiply-adds": spread([100 * r["share"] for r in same]),
            "dense": spread([r["dense"] for r in same]),
            "before fine-tuning": spread([r["one_shot"] for r in same]),
            "fine-tuned": spread(tuned) if tuned else "",
        })  # fmt: skip
    lines = [f"Top-1, means and standard errors over {seeds} seeds.", "", as_table(table, left=3)]
    lines += ["", "Leakage: the prediction, when the masks are fed labels.", ""]
    lines += [as_table([{"": key, "%": spread([x[key] for x in leaks])} for key in leaks[0]])]
    lines += ["", "Deletion: points of accuracy lost, means over classes and seeds, with standard "
              "errors.", "", as_table(summarize_deletion(falls), left=2)]  # fmt: skip
    about = rows[0]
    lines += ["", f"`{about['command']}`, on {about['machine']}, torch {about['torch']}, timm "
              f"{about['timm']}, commit {about['commit']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parse()
    rows: list[dict] = []
    leaks: list[dict] = []
    falls: list[dict] = []
    for seed in range(options.seed, options.seed + len(options.checkpoints)):
        folder = options.output / f"seed{seed}" / "masks"
        job = run_step(options, folder, seed, "--step", "masks")
        explained = explain(seed, job)
        leaks.append(explained["leakage"])
        falls += explained["deletion"]
        rows += compare(options, seed, job)
        options.results.mkdir(parents=True, exist_ok=True)
        for name, found in (("", rows), ("_deletion", falls)):
            with whole_or_not_at_all(options.results / f"{options.name}{name}.csv", "w") as file:
                write_csv(found, file)
        text = write_up(rows, leaks, falls, len(leaks))
        with whole_or_not_at_all(options.results / f"{options.name}.md", "w") as file:
            file.write(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        fail(str(error).strip().splitlines()[-1])
