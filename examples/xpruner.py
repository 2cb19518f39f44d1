"""X-Pruner-style pruning of a timm model: units chosen by what they do for each class.

    python examples/xpruner.py MODEL --pretrained --data FOLDER --target 0.6 --output DIR
    python examples/xpruner.py ... --step masks          then --step rates, then --step tune
    python examples/xpruner.py ... --resume              after an interruption
    torchrun --nproc-per-node 8 examples/xpruner.py ...  on eight GPUs

Three steps, each from the file of the one before. masks: the model is frozen, and every head
and neuron learns a factor for each class (DIR/masks.safetensors). rates: what the factors
add up to ranks the units, and a pruning rate for each layer is learned with the weights
until the share --target of the multiply-adds is left (DIR/pruned.safetensors, the units are
gone). tune: what is left is fine-tuned (DIR/slim.safetensors). torch_dimap.load_pruned(
timm.create_model(MODEL), FILE) gives either model.

At the end: a table, the tests of faithfulness, and pictures (DIR/report.md, DIR/*.png).
DIR/log.csv has a row per epoch. --data digits takes scikit-learn's digits, without a download.
"""

from __future__ import annotations

import argparse
import sys

from images import only_classes, training_loader
from models import save_model
from safetensors.torch import load_file
from steps import (
    Job,
    Step,
    add_common_arguments,
    build,
    check_common_arguments,
    learn,
    main_of,
    open_job,
    run_steps,
    save_slim,
    steps_to_do,
)
from timm.utils import ParseKwargs
from torch import Tensor, nn
from training import Besides, set_seeds
from unit_scores import SCORES
from xpruner_report import report

import torch_dimap
from torch_dimap.learning import (
    ClassMasks,
    HeldCost,
    Joined,
    LayerRates,
    prune_units_by_percentile,
)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, STEPS)
    add = parser.add_argument
    add("--target", type=float, default=0.6, metavar="A",
        help="the share of the multiply-adds to keep, 0 to 1 (default: 0.6)")
    add("--classes", type=int, nargs="+", metavar="C",
        help="prune and tune for these classes alone, by their numbers (default: all)")
    add("--mask-epochs", type=int, default=20, metavar="N", help="(default: 20)")
    add("--mask-lr", type=float, default=1e-2, metavar="LR", help="(default: 1e-2)")
    add("--penalties", nargs="*", action=ParseKwargs, default={"squares": 1e-4},
        metavar="NAME=W", help="on the masks: squares, norms, unit_laplacian, class_difference, "
        "class_mean, with their weights (default: squares=1e-4)")
    add("--scores", choices=["masks", "all_masks", *SCORES], default="masks",
        help="what ranks the units: masks, of --classes; all_masks, of all classes; the others "
        "are to compare with (default: masks)")
    add("--rates", choices=["learned", "layer", "kind"], default="learned",
        help="learned, or without training one rate for every layer or one ranking of each kind "
        "of unit (default: learned)")
    add("--rate-epochs", type=int, default=20, metavar="N",
        help="at most; learned rates that stand still end the step (default: 20)")
    add("--rate-lr", type=float, default=5e-4, metavar="LR", help="of weights (default: 5e-4)")
    add("--threshold-lr", type=float, default=0.05, metavar="LR", help="(default: 0.05)")
    add("--beta", type=float, default=20.0, metavar="B",
        help="the weight of the squared distance from the target (default: 20)")
    add("--eta", type=float, default=0.05, metavar="E",
        help="the step of the multiplier that holds the target (default: 0.05)")
    add("--tune-epochs", type=int, default=10, metavar="N", help="(default: 10)")
    add("--tune-lr", type=float, default=5e-4, metavar="LR", help="the first (default: 5e-4)")
    add("--probe-images", type=int, default=2000, metavar="N",
        help="test images for the tests of faithfulness; 0 leaves them out (default: 2000)")
    options = parser.parse_args(words)
    check_common_arguments(parser, options)
    if not 0 < options.target < 1:
        parser.error(f"--target must lie between 0 and 1, found {options.target}")
    if min(options.mask_epochs, options.rate_epochs) < 1:
        parser.error("--mask-epochs and --rate-epochs must be at least 1")
    if min(options.tune_epochs, options.probe_images) < 0:
        parser.error("--tune-epochs and --probe-images must be 0 or more")
    return options


def needs_masks(options: argparse.Namespace) -> bool:
    return options.scores in ("masks", "all_masks")


def learn_masks(job: Job) -> None:
    """Step 1: what does each unit do for each class?"""
    options = job.options
    model = build(options, job.classes).eval()
    masks = ClassMasks(model, torch_dimap.group_units(model), job.classes)

    def penalty() -> Tensor:
        return sum(weight * masks.penalty(name) for name, weight in options.penalties.items())

    learn(job, "masks", masks, Joined(model, masks),
          [{"params": list(masks.parameters()), "lr": options.mask_lr, "weight_decay": 0.0}],
          options.mask_epochs, Besides(masks.labels, penalty, frozen=True))  # fmt: skip
    if job.rank == 0:
        save_model(masks, job.file("masks"))


def rank_units(job: Job, model: nn.Module) -> dict:
    """Return what ranks the units."""
    options, units = job.options, torch_dimap.group_units(model)
    if needs_masks(options):
        with ClassMasks(model, units, job.classes) as masks:
            masks.load_state_dict(load_file(job.file("masks"), device=options.device))
            return masks.scores(options.classes if options.scores == "masks" else None)
    set_seeds(options.seed)
    layers = [layer for members in units.values() for layer in members]
    several = argparse.Namespace(**{**vars(options), "batch_size": min(512, len(job.train))})
    batch = next(iter(training_loader(job.train, several)))
    return SCORES[options.scores](layers, model, batch, options)


def learn_rates(job: Job) -> None:
    """Step 2: how many units does each layer lose?"""
    options = job.options
    model = build(options, job.classes)
    units, scores = torch_dimap.group_units(model), rank_units(job, model)
    image = job.test[0][0][None].to(options.device)
    if options.rates != "learned":
        done = prune_units_by_percentile(model, image, options.target, units, scores, options.rates)
    else:
        held = HeldCost(options.target, options.beta, options.eta)
        rates = LayerRates(model, units, scores, image, held)
        weights = {"params": list(model.parameters()), "lr": options.rate_lr}
        thresholds = {"params": list(rates.parameters()), "lr": options.threshold_lr,
                      "weight_decay": 0.0}  # fmt: skip
        both = Joined(model, rates)
        learn(job, "rates", both, both, [weights, thresholds], options.rate_epochs,
              Besides(penalty=rates.penalty, after_step=rates.update),
              lambda: {"soft": rates.soft, "hard": rates.hard, "gamma": held.gamma},
              rates.stand_still)  # fmt: skip
        if abs(rates.soft - options.target) > 0.02 and job.rank == 0:
            print(f"xpruner: the rates have not reached the target: {rates.soft:.3f} of the "
                  f"multiply-adds are kept by them, not {options.target}; give --rate-epochs more.",
                  file=sys.stderr)  # fmt: skip
        done = rates.harden()
    if job.rank == 0:
        print(f"rates: {done.share:.2%} of the multiply-adds are kept", flush=True)
        save_slim(job, torch_dimap.remove_units(model.eval()), job.file("rates"))


def tune(job: Job) -> None:
    """Step 3: fine-tune what is left."""
    model = torch_dimap.load_pruned(build(job.options, job.classes), job.file("rates"))
    learn(job, "tune", model, model, [{"params": list(model.parameters()),
                                       "lr": job.options.tune_lr}],
          job.options.tune_epochs, Besides())  # fmt: skip
    if job.rank == 0:
        save_slim(job, model, job.file("tune"))


STEPS = {
    "masks": Step(learn_masks, "masks.safetensors", ("mask_epochs", "mask_lr", "penalties")),
    "rates": Step(learn_rates, "pruned.safetensors",
                  ("target", "scores", "classes", "rates", "rate_epochs", "rate_lr",
                   "threshold_lr", "beta", "eta")),
    "tune": Step(tune, "slim.safetensors", ("tune_epochs", "tune_lr")),
}  # fmt: skip


def run(options: argparse.Namespace) -> Job:
    """Do the steps that are asked for."""
    needed = [step for step in STEPS if step != "masks" or needs_masks(options)]
    names = steps_to_do(STEPS, needed, options)
    job = open_job(STEPS, options)
    if options.classes:
        train, test = (only_classes(data, options.classes) for data in (job.train, job.test))
        job = job._replace(train=train, test=test)
    run_steps(job, names)
    return job


def models_of(job: Job) -> dict[str, nn.Module]:
    """Return the dense model, and what the steps have made of it."""
    models = {"dense": build(job.options, job.classes)}
    for name, step in (("pruned", "rates"), ("fine-tuned", "tune")):
        if job.file(step).is_file():
            dense = build(job.options, job.classes)
            models[name] = torch_dimap.load_pruned(dense, job.file(step))
    return models


def main(words: list[str] | None = None) -> None:
    options = parse(words)

    def work() -> None:
        job = run(options)
        if job.rank == 0:
            masks = load_file(job.file("masks")) if job.file("masks").is_file() else None
            about = {**job.about, "scores": options.scores, "rates": options.rates}
            print(report(models_of(job), masks, job.test, job.classes, options, about))

    main_of("xpruner", work)


if __name__ == "__main__":
    main()
