"""Methods that train in steps, each from the file of the one before, and go on when stopped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from images import (
    AUGMENTATIONS,
    add_data_arguments,
    open_splits,
    set_transforms,
    training_loader,
)
from models import (
    add_model_kwargs_argument,
    add_weights_arguments,
    fail,
    load_model,
    save_model,
    whole_or_not_at_all,
)
from provenance import provenance, write_csv
from resuming import claim_new, kept_options, read_state
from timm.data import Mixup
from timm.scheduler import StepLRScheduler, create_scheduler_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from training import Besides, Training, run_epoch, set_seeds, start_processes, updates_per_epoch

import torch_dimap

# The options that every step's file is made with.
EVERY = ("model", "model_kwargs", "pretrained", "checkpoint", "random_init", "dataset", "seed",
         "batch_size", "accumulate", "augmentation", "scale", "smoothing", "weight_decay", "amp",
         "train_split", "test_split", "data_kwargs")  # fmt: skip


class Step(NamedTuple):
    """One step of a method."""

    do: Callable[[Job], None]
    file: str  # that it makes at its end
    options: tuple[str, ...]  # that it takes besides EVERY and those of the steps before


class Job(NamedTuple):
    """What all steps of a run share."""

    steps: dict[str, Step]
    options: argparse.Namespace
    train: Dataset
    test: Dataset
    classes: int
    rank: int
    world: int
    about: dict[str, str]

    def file(self, step: str) -> Path:
        """Return where a step puts what it makes."""
        return self.options.output / self.steps[step].file

    def state(self, step: str) -> Path:
        """Return where a step keeps what it goes on from."""
        return self.options.output / f"{step}.pth"


def add_common_arguments(parser: argparse.ArgumentParser, steps: Iterable[str]) -> None:
    """Add the options that a method in steps needs, whatever it does in them."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm name")
    add_weights_arguments(parser)
    add_model_kwargs_argument(parser)
    add_data_arguments(parser)
    add("--output", type=Path, required=True, metavar="DIR", help="the folder of all files")
    add("--step", choices=["all", *steps], default="all", help="(default: all)")
    add("--resume", action="store_true", help="go on in DIR, where the same command stopped")
    add("--weight-decay", type=float, default=1e-8, metavar="W", help="(default: 1e-8)")
    add("--accumulate", type=int, default=1, metavar="N",
        help="forward passes per optimizer step (default: 1)")
    add("--augmentation", choices=AUGMENTATIONS, default="swin", help="(default: swin)")
    add("--scale", type=float, default=0.08, metavar="S",
        help="the smallest share of an image that a random crop takes (default: 0.08)")
    add("--smoothing", type=float, default=0.1, metavar="S", help="of labels (default: 0.1)")
    add("--seed", type=int, default=0, help="(default: 0)")


def check_common_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if min(options.batch_size, options.accumulate) < 1:
        parser.error("--batch-size and --accumulate must be at least 1")
    if options.augmentation == "swin" and options.batch_size % 2:
        parser.error(f"--batch-size must be even for mixup, found {options.batch_size}")


def open_job(steps: dict[str, Step], options: argparse.Namespace) -> Job:
    rank, world = start_processes(options)
    train, test, classes = open_splits(options)
    model = build(options, classes)
    set_transforms(train, test, model, options, options.augmentation, options.scale)
    return Job(steps, options, train, test, classes, rank, world, provenance(options.device))


def build(options: argparse.Namespace, classes: int) -> nn.Module:
    """Return the dense model."""
    set_seeds(options.seed)
    return load_model(
        options.model, pretrained=options.pretrained, checkpoint=options.checkpoint,
        num_classes=classes, **options.model_kwargs,
    ).to(options.device)  # fmt: skip


def free_of(steps: dict[str, Step], step: str, options: argparse.Namespace) -> set[str]:
    """Name the options that a step's files do not depend on."""
    before = list(steps)[: list(steps).index(step) + 1]
    return set(vars(options)) - {*EVERY, *(name for x in before for name in steps[x].options)}


def updates(job: Job) -> int:
    """Return how many optimizer steps an epoch has."""
    loader = training_loader(job.train, job.options, job.rank, job.world)
    found = updates_per_epoch(loader, job.options)
    if found == 0:
        fail(f"{len(job.train)} training images fill no step: lower --batch-size or --accumulate.")
    return found


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
    options, path = job.options, job.state(step)
    per_epoch = updates(job)
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    scheduler = StepLRScheduler(optimizer, decay_t=sys.maxsize, t_in_epochs=False)
    if ready is None:
        scheduler, _ = create_scheduler_v2(
            optimizer, "cosine", num_epochs=max(1, epochs), min_lr=0.0, warmup_epochs=0,
            step_on_epochs=False, updates_per_epoch=per_epoch,
        )  # fmt: skip
    scaler = torch.amp.GradScaler(options.device, enabled=options.amp == "float16")
    training = Training(module, optimizer, scheduler, scaler, None)
    free = free_of(job.steps, step, options)
    if options.resume and path.exists():
        training.load_state_dict(read_state(path, options, free))
    if job.world > 1:
        devices = [torch.cuda.current_device()] if options.device == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=devices)
    mixup = None
    if options.augmentation == "swin" and not besides.frozen:
        mixup = Mixup(0.8, 1.0, label_smoothing=options.smoothing, num_classes=job.classes)
    loader = training_loader(job.train, options, job.rank, job.world)
    while training.epochs_done < epochs and not (ready and ready()):
        title = f"{step}: epoch {training.epochs_done + 1}/{epochs}"
        loss, top1, speed = run_epoch(
            training, forward, loader, job.test, options, mixup, title, besides
        )
        figures = {"step": step, "epoch": training.epochs_done, "loss": loss, "top1": top1, **row()}
        training.log.append({**figures, "images_per_second": round(speed, 1), "seed": options.seed,
                             **job.about})  # fmt: skip
        if job.rank == 0:
            state = {**training.state_dict(), "options": kept_options(options, free)}
            with whole_or_not_at_all(path) as file:
                torch.save(state, file)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items()
                              if isinstance(value, float) and value == value)  # fmt: skip
            print(f"{title}: {shown}, {speed:.0f} images/s", flush=True)
    return training


def save_slim(job: Job, model: nn.Module, path: Path) -> None:
    """Write a model that has lost something; one that has lost nothing as it is."""
    sizes = [sum(x.numel() for x in m.parameters())
             for m in (model, build(job.options, job.classes))]  # fmt: skip
    (save_model if sizes[0] == sizes[1] else torch_dimap.save_pruned)(model, path)


def steps_to_do(
    steps: dict[str, Step], needed: Collection[str], options: argparse.Namespace
) -> list[str]:
    """Name the steps, once the folder holds what they need and nothing that they would replace."""
    names = [name for name in steps if name in needed]
    todo = names if options.step == "all" else [options.step]
    files = {name: options.output / steps[name].file for name in names}
    if options.step == "all" and not options.resume:
        claim_new(options.output)
    for before in names[: names.index(todo[0])]:
        if not files[before].is_file():
            fail(f"there is no {files[before]}: run --step {before} first.")
        if (options.output / f"{before}.pth").is_file():
            free = free_of(steps, before, options)
            read_state(options.output / f"{before}.pth", options, free)
    if not options.resume and any(options.output.glob(f"{todo[0]}.pth")):
        fail(f"{options.output} holds the step {todo[0]} already: choose another, or --resume.")
    return [name for name in todo if not (options.resume and files[name].is_file())]


def run_steps(job: Job, names: Iterable[str]) -> None:
    """Do steps one after the other, and write the rows of all steps to one table."""
    job.options.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        job.steps[name].do(job)
        if dist.is_initialized():
            dist.barrier()  # the file of this step is there for all
    if job.rank == 0:
        paths = [path for path in map(job.state, job.steps) if path.is_file()]
        rows = [row for path in paths
                for row in torch.load(path, map_location="cpu", weights_only=True)["log"]]
        with whole_or_not_at_all(job.options.output / "log.csv", "w") as file:
            write_csv(rows, file)


def main_of(name: str, work: Callable[[], None]) -> None:
    """Run a script's work, and end with one line where it is stopped or fails."""
    again = "--resume goes on after the last whole epoch."
    try:
        work()
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; {again}", file=sys.stderr)
        sys.exit(130)
    except (OSError, FloatingPointError, ValueError) as error:
        fail(f"{str(error).strip().splitlines()[-1]}; {again}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
