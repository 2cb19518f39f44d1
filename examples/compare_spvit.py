"""What in SPViT matters: how a target is met, and controls of what a search has found.

For each checkpoint, one for each seed: a search that holds the target by its multiplier, and
searches with fixed weights; then what was found is fine-tuned, from the original weights and
from those of the search, with other neurons of the same number, and without its
convolutions. Besides, the first blocks are made 3x3 or 1x1 convolutions, from the attention's
weights and from random ones, or nothing. All fine-tunings have the same length.

    python examples/compare_spvit.py --checkpoints A B C --output DIR --name NAME -- \\
        MODEL --data FOLDER ...

What comes after -- goes to spvit.py. Writes NAME.csv and NAME.md to --results; the runs
themselves are in --output, and finished ones are not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import spvit
from models import whole_or_not_at_all
from provenance import write_csv
from speed import spread
from tables import as_table, results
from tqdm import tqdm

CODES = {"attention": "A", "conv3": "3", "conv1": "1", "skip": "0"}
OF_FOUND = {
    "found, from the original weights": [],
    "found, from the weights of the search": ["--start", "search"],
    "found, other neurons": ["--control", "neurons"],
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoints", type=Path, nargs="+", required=True, metavar="FILE",
        help="the dense weights, a file for each seed")
    add("--weights", type=float, nargs="*", default=[2.0, 20.0, 40.0, 80.0, 200.0], metavar="W",
        help="fixed weights to search with (default: 2 20 40 80 200)")
    add("--first", type=int, nargs="*", default=[2, 4], metavar="N",
        help="how many of the first blocks become convolutions (default: 2 4)")
    add("--seed", type=int, default=0, help="of the first checkpoint, counted up (default: 0)")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder of the runs")
    add("--results", type=Path, default=Path("examples/results"), metavar="DIR",
        help="(default: examples/results)")
    add("--name", default="spvit", help="of the files (default: spvit)")
    add("words", nargs=argparse.REMAINDER, metavar="-- ...", help="options of spvit.py")
    options = parser.parse_args()
    options.words = [word for word in options.words if word != "--"]
    return options


def run(options: argparse.Namespace, arm: str, seed: int, *more: object) -> spvit.Job:
    """Run spvit.py in this process, as far as the arm's folder does not hold the results."""
    folder = options.output / f"seed{seed}" / arm.replace(" ", "_").replace(",", "")
    if arm in OF_FOUND:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("search.pth", "found.json"):
            shutil.copyfile(folder.parent / "search" / name, folder / name)
    own = ["--checkpoint", options.checkpoints[seed - options.seed], "--output", folder,
           "--seed", seed, "--resume", *more]  # fmt: skip
    return spvit.run(spvit.parse([*options.words, *map(str, own)]))


def searched(job: spvit.Job, arm: str) -> dict:
    told = json.loads(job.file("search").read_text())
    operations = "".join(CODES[operation] for operation in told["operations"].values())
    epochs = (job.options.output / "log.csv").read_text().count("\nsearch,")
    return {"arm": arm, "share": told["share"], "operations": operations,
            "neurons": " ".join(map(str, told["neurons"].values())), "search_epochs": epochs}


def tuned(job: spvit.Job, arm: str, dense: dict | None) -> tuple[dict, dict]:
    """Return a row of figures of a fine-tuned model, and those of the dense one."""
    models = spvit.models_of(job)
    if dense is not None:
        models.pop("dense")
    rows = {row["model"]: row for row in results(models, job.test, job.options)}
    dense = dense or rows["dense"]
    row = rows["fine-tuned"]
    share = row["multiply-adds, M"] / dense["multiply-adds, M"]
    return {"arm": arm, "counted_share": share, "top1": row["top1"], "dense": dense["top1"],
            "parameters": row["parameters, M"], "tune_epochs": job.options.tune_epochs}, dense


def compare(options: argparse.Namespace, seed: int, bar: tqdm) -> list[dict]:
    """Return a row for every arm."""
    job = run(options, "search", seed, "--step", "search")
    rows = [searched(job, "search, target held")]
    target = job.options.target
    bar.update()
    for weight in options.weights:
        job = run(options, f"weight {weight:g}", seed, "--step", "search", "--weight", weight)
        rows.append(searched(job, f"search, weight {weight:g}"))
        bar.update()
    dense = None
    for arm, more in OF_FOUND.items():
        row, dense = tuned(run(options, arm, seed, "--step", "tune", *more), arm, dense)
        rows.append(row)
        bar.update()
    blocks = len(rows[0]["operations"])
    for first in options.first:
        for operation, control in (("conv3", "none"), ("conv3", "weights"), ("conv1", "none"),
                                   ("conv1", "weights"), ("skip", "none")):  # fmt: skip
            operations = [operation] * first + ["attention"] * (blocks - first)
            arm = f"first {first} {operation}{', random weights' * (control == 'weights')}"
            job = run(options, arm, seed, "--operations", *operations, "--control", control)
            rows.append(tuned(job, arm, dense)[0])
            bar.update()
    return [{"seed": seed, "target": target, **row, **job.about} for row in rows]


def write_up(rows: list[dict], seeds: int) -> str:
    """Lay out the means over the seeds."""
    arms: dict[str, list[dict]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    searches = [
        {"search": arm, "share of the multiply-adds": spread([r["share"] for r in same], 3),
         "epochs": spread([r["search_epochs"] for r in same], 0),
         "operations found": ", ".join(dict.fromkeys(r["operations"] for r in same))}
        for arm, same in arms.items() if "share" in same[0]
    ]  # fmt: skip
    tunings = [
        {"fine-tuned": arm, "top-1": spread([r["top1"] for r in same], 2),
         "counted share of the multiply-adds": spread([r["counted_share"] for r in same], 3)}
        for arm, same in arms.items() if "top1" in same[0]
    ]  # fmt: skip
    dense = [row["dense"] for row in arms["found, other neurons"]]
    about = rows[0]
    return "\n".join([
        f"Means over {seeds} seeds, in brackets the lowest and the highest. Dense top-1: "
        f"{spread(dense, 2)}. Target: {about['target']}.", "",
        "The share is of SPViT's own count of multiply-adds. Operations block by block: A "
        "attention, 3 and 1 convolutions, 0 nothing.", "", as_table(searches), "",
        f"Fine-tuned for {rows[-1]['tune_epochs']} epochs; multiply-adds counted by count_flops.",
        "", as_table(tunings), "",
        f"`{about['command']}`, on {about['machine']}, torch {about['torch']}, timm "
        f"{about['timm']}, commit {about['commit']}.", "",
    ])  # fmt: skip


def main() -> None:
    options = parse()
    seeds = range(options.seed, options.seed + len(options.checkpoints))
    arms = 1 + len(options.weights) + len(OF_FOUND) + 5 * len(options.first)
    with tqdm(total=arms * len(seeds), unit="arm") as bar:
        rows = [row for seed in seeds for row in compare(options, seed, bar)]
    options.results.mkdir(parents=True, exist_ok=True)
    with whole_or_not_at_all(options.results / f"{options.name}.csv", "w") as file:
        write_csv(rows, file)
    text = write_up(rows, len(seeds))
    with whole_or_not_at_all(options.results / f"{options.name}.md", "w") as file:
        file.write(text)
    print(text)


if __name__ == "__main__":
    main()
