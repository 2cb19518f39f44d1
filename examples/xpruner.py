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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from images import only_classes, open_splits, set_transforms, training_loader
from models import fail, load_model, save_model, whole_or_not_at_all
from provenance import provenance, write_csv
from resuming import claim_new, kept_options, read_state
from safetensors.torch import load_file
from timm.data import Mixup
from timm.scheduler import StepLRScheduler, create_scheduler_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from training import Besides, Training, run_epoch, set_seeds, start_processes, updates_per_epoch
from unit_scores import SCORES
from xpruner_options import PRODUCTS, free_of, needs_masks, parse
from xpruner_report import report

import torch_dimap
from torch_dimap.learning import (
    ClassMasks,
    HeldCost,
    Joined,
    LayerRates,
    prune_units_by_percentile,
)


class Job(NamedTuple):
    """What all steps share."""

    options: argparse.Namespace
    train: Dataset
    test: Dataset
    classes: int
    rank: int
    world: int
    about: dict[str, str]

    def file(self, step: str) -> Path:
        """Return where a step puts what it makes."""
        return self.options.output / PRODUCTS[step]


def open_job(options: argparse.Namespace) -> Job:
    rank, world = start_processes(options)
    train, test, classes = open_splits(options)
    model = build(options, classes)
    set_transforms(train, test, model, options, options.augmentation, options.scale)
    if options.classes:
        train, test = (only_classes(data, options.classes) for data in (train, test))
    return Job(options, train, test, classes, rank, world, provenance(options.device))


def build(options: argparse.Namespace, classes: int) -> nn.Module:
    """Return the dense model."""
    set_seeds(options.seed)
    return load_model(
        options.model, pretrained=options.pretrained, checkpoint=options.checkpoint,
        num_classes=classes, **options.model_kwargs,
    ).to(options.device)  # fmt: skip


def learn(
    job: Job,
    step: str,
    module: nn.Module,
    forward: nn.Module,
    groups: list[dict[str, Any]],
    epochs: int,
    besides: Besides,
    row: Callable[[], dict[str, Any]] = dict,
    ready: Callable[[], bool] | None = None,
) -> Training:
    """Train what a step trains, from where its file ends, and write the file every epoch.

    Args:
        job: what all steps share.
        step: its name.
        module: what is trained and saved.
        forward: what maps images to outputs.
        groups: of parameters, each with its learning rate.
        epochs: how many, at most.
        besides: what goes on in an epoch besides.
        row: what the log gets besides.
        ready: says that the step is done; then the learning rates stay as they are, too.
    """
    options, path = job.options, job.options.output / f"{step}.pth"
    loader = training_loader(job.train, options, job.rank, job.world)
    updates = updates_per_epoch(loader, options)
    if updates == 0:
        fail(f"{len(job.train)} training images fill no step: lower --batch-size or --accumulate.")
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    scheduler = StepLRScheduler(optimizer, decay_t=sys.maxsize, t_in_epochs=False)
    if ready is None:
        scheduler, _ = create_scheduler_v2(
            optimizer, "cosine", num_epochs=max(1, epochs), min_lr=0.0, warmup_epochs=0,
            step_on_epochs=False, updates_per_epoch=updates,
        )  # fmt: skip
    scaler = torch.amp.GradScaler(options.device, enabled=options.amp == "float16")
    training = Training(module, optimizer, scheduler, scaler, None)
    if options.resume and path.exists():
        training.load_state_dict(read_state(path, options, free_of(step, options)))
    if job.world > 1:
        devices = [torch.cuda.current_device()] if options.device == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=devices)
    mixup = None
    if options.augmentation == "swin" and not besides.frozen:
        mixup = Mixup(0.8, 1.0, label_smoothing=options.smoothing, num_classes=job.classes)
    while training.epochs_done < epochs and not (ready and ready()):
        title = f"{step}: epoch {training.epochs_done + 1}/{epochs}"
        loss, top1, speed = run_epoch(
            training, forward, loader, job.test, options, mixup, title, besides
        )
        figures = {"step": step, "epoch": training.epochs_done, "loss": loss, "top1": top1, **row()}
        training.log.append({**figures, "images_per_second": round(speed, 1), "seed": options.seed,
                             **job.about})  # fmt: skip
        if job.rank == 0:
            kept = kept_options(options, free_of(step, options))
            with whole_or_not_at_all(path) as file:
                torch.save({**training.state_dict(), "options": kept}, file)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items()
                              if isinstance(value, float) and value == value)  # fmt: skip
            print(f"{title}: {shown}, {speed:.0f} images/s", flush=True)
    return training


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
        torch_dimap.save_pruned(torch_dimap.remove_units(model.eval()), job.file("rates"))


def tune(job: Job) -> None:
    """Step 3: fine-tune what is left."""
    model = torch_dimap.load_pruned(build(job.options, job.classes), job.file("rates"))
    learn(job, "tune", model, model, [{"params": list(model.parameters()),
                                       "lr": job.options.tune_lr}],
          job.options.tune_epochs, Besides())  # fmt: skip
    if job.rank == 0:
        torch_dimap.save_pruned(model, job.file("tune"))


STEPS = {"masks": learn_masks, "rates": learn_rates, "tune": tune}


def steps_to_do(options: argparse.Namespace) -> list[str]:
    """Name the steps, once the folder holds what they need and nothing that they would replace."""
    needed = [step for step in STEPS if step != "masks" or needs_masks(options)]
    steps = needed if options.step == "all" else [options.step]
    files = {step: options.output / PRODUCTS[step] for step in needed}
    if options.step == "all" and not options.resume:
        claim_new(options.output)
    for before in needed[: needed.index(steps[0])]:
        if not files[before].is_file():
            fail(f"there is no {files[before]}: run --step {before} first.")
        if (options.output / f"{before}.pth").is_file():
            read_state(options.output / f"{before}.pth", options, free_of(before, options))
    if not options.resume and any(options.output.glob(f"{steps[0]}.pth")):
        fail(f"{options.output} holds the step {steps[0]} already: choose another, or --resume.")
    return [step for step in steps if not (options.resume and files[step].is_file())]


def run(options: argparse.Namespace) -> Job:
    """Do the steps that are asked for."""
    steps = steps_to_do(options)
    job = open_job(options)
    options.output.mkdir(parents=True, exist_ok=True)
    for step in steps:
        STEPS[step](job)
        if dist.is_initialized():
            dist.barrier()  # the file of this step is there for all
    if job.rank == 0:
        write_log(job)
    return job


def write_log(job: Job) -> None:
    """Write the rows of all steps to one table."""
    paths = [job.options.output / f"{step}.pth" for step in STEPS]
    rows = [row for path in paths if path.is_file()
            for row in torch.load(path, map_location="cpu", weights_only=True)["log"]]  # fmt: skip
    with whole_or_not_at_all(job.options.output / "log.csv", "w") as file:
        write_csv(rows, file)


def models_of(job: Job) -> dict[str, nn.Module]:
    """Return the dense model, and what the steps have made of it."""
    models = {"dense": build(job.options, job.classes)}
    for name, step in (("pruned", "rates"), ("fine-tuned", "tune")):
        if job.file(step).is_file():
            dense = build(job.options, job.classes)
            models[name] = torch_dimap.load_pruned(dense, job.file(step))
    return models


def main(words: list[str] | None = None) -> None:
    options = parse(__doc__, words)
    try:
        job = run(options)
        if job.rank == 0:
            masks = load_file(job.file("masks")) if job.file("masks").is_file() else None
            about = {**job.about, "scores": options.scores, "rates": options.rates}
            print(report(models_of(job), masks, job.test, job.classes, options, about))
    except KeyboardInterrupt:
        print("\nxpruner: stopped; --resume goes on after the last whole epoch.", file=sys.stderr)
        sys.exit(130)
    except (OSError, FloatingPointError, ValueError) as error:
        fail(f"{str(error).strip().splitlines()[-1]}; --resume goes on after the last whole epoch.")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
