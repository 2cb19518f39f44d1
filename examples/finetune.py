"""Prune a timm model, fine-tune it, bake the masks and save it; or train one from scratch.

The defaults are the paper's recipe: AdamW, 30 epochs, learning rate up from 2e-8 to 2e-5 in
15 epochs and down to 2e-7 along a cosine, weight decay 1e-8, Swin's augmentation.

    python examples/finetune.py swin_tiny_patch4_window7_224 --pretrained --data imagenet \\
        --amount 0.55 --output swin_tiny_55
    python examples/finetune.py ... --reconstruct 256          refits the kept weights first
    torchrun --nproc-per-node 8 examples/finetune.py ...       on eight GPUs
    torchrun --nproc-per-node 8 examples/finetune.py ... --fsdp    for models that fill a GPU
    python examples/finetune.py ... --resume                   after an interruption
    python examples/finetune.py ... --random-init --amount 0   trains a dense model
    python examples/finetune.py ... --method units             whole heads and neurons, for speed

OUTPUT/log.csv has a row per epoch; OUTPUT/last.pth is what --resume continues from, written
after every epoch; OUTPUT/model.safetensors is the baked model, for timm's checkpoint_path.
With --method units OUTPUT/slim.safetensors too: the weights without the units that are gone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from images import (
    AUGMENTATIONS,
    add_data_arguments,
    open_splits,
    set_transforms,
    training_loader,
)
from methods import METHODS, SCORED, UNITS, masks, prunable
from models import (
    add_model_kwargs_argument,
    add_weights_arguments,
    fail,
    load_model,
    save_model,
    save_weights,
    whole_or_not_at_all,
)
from provenance import provenance, write_csv
from resuming import claim_new, kept_options, read_state
from sharded import shard, spread, total, whole, why_not_sharded
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from training import (
    Training,
    reconstruct_alike,
    run_epoch,
    set_seeds,
    start_processes,
    updates_per_epoch,
)

import torch_dimap
from torch_dimap import PruningSchedule

# What may differ between a run and its resumption: where it runs, not what it computes.
FREE = ("resume", "output", "data", "device", "workers", "fsdp")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm name")
    add_weights_arguments(parser)
    add_model_kwargs_argument(parser)
    add_data_arguments(parser)
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder for the results")
    add("--resume", action="store_true", help="go on from DIR/last.pth of the same command")
    add("--amount", type=float, required=True, metavar="A",
        help="the fraction of the prunable weights to remove, 0 to 1, or with --method units of "
        "the heads and of the neurons; 0 trains a dense model")
    add("--method", default="dimap",
        choices=[*(name for name, (_, by) in METHODS.items() if by not in SCORED), UNITS],
        help="what is ranked, and against what (default: dimap)")
    add("--steps", type=int, default=1, metavar="N",
        help="reach the amount in N rounds, epochs / N apart, along a cubic curve (default: 1)")
    add("--reconstruct", type=int, default=0, metavar="N",
        help="refit the kept weights on N training images before the first epoch (default: 0)")
    add("--epochs", type=int, default=30, help="(default: 30)")
    add("--warmup-epochs", type=int, default=15, metavar="N", help="(default: 15)")
    add("--lr", type=float, default=2e-5, help="the highest learning rate (default: 2e-5)")
    add("--warmup-lr", type=float, default=2e-8, metavar="LR", help="the first (default: 2e-8)")
    add("--min-lr", type=float, default=2e-7, metavar="LR", help="the last (default: 2e-7)")
    add("--weight-decay", type=float, default=1e-8, metavar="W", help="(default: 1e-8)")
    add("--opt", default="adamw", metavar="NAME", help="a timm optimizer (default: adamw)")
    add("--accumulate", type=int, default=1, metavar="N",
        help="forward passes per optimizer step (default: 1)")
    add("--augmentation", choices=AUGMENTATIONS, default="swin", help="(default: swin)")
    add("--scale", type=float, default=0.08, metavar="S",
        help="the smallest share of an image that a random crop takes (default: 0.08)")
    add("--smoothing", type=float, default=0.1, metavar="S", help="of labels (default: 0.1)")
    add("--ema-decay", type=float, default=0.0, metavar="D",
        help="test and save an exponential moving average of the weights (default: 0, off)")
    add("--fsdp", action="store_true",
        help="shard the weights over the processes (fully_shard); for methods that rank by the "
        "DIMAP score")
    add("--seed", type=int, default=0, help="(default: 0)")
    options = parser.parse_args(words)
    if not 0 <= options.amount <= 1:
        parser.error(f"--amount must lie between 0 and 1, found {options.amount}")
    if not 1 <= options.steps <= options.epochs:
        parser.error(f"--steps must lie between 1 and --epochs, found {options.steps}")
    if options.reconstruct < 0 or options.reconstruct and not options.amount:
        parser.error("--reconstruct takes a number of images, and a model to prune")
    if not 0 <= options.warmup_epochs < options.epochs:
        parser.error(f"--warmup-epochs must lie below --epochs, found {options.warmup_epochs}")
    if not 0 <= options.ema_decay < 1:
        parser.error(f"--ema-decay must lie between 0 and 1, found {options.ema_decay}")
    if min(options.batch_size, options.accumulate) < 1:
        parser.error("--batch-size and --accumulate must be at least 1")
    if options.fsdp and (obstacle := why_not_sharded(options)):
        parser.error(f"--fsdp {obstacle}")
    if options.augmentation == "swin" and options.batch_size % 2:
        parser.error(f"--batch-size must be even for mixup, found {options.batch_size}")
    return options


def pruning_schedule(model: nn.Module, options: argparse.Namespace) -> PruningSchedule | None:
    """Plan the rounds over the epochs; from here on the model has masks. None: stays dense."""
    if not options.amount:
        return None
    every = options.epochs // options.steps
    parameters, ranking = prunable(model, options.method)
    return PruningSchedule(
        parameters, options.amount, end=(options.steps - 1) * every, every=every,
        pruning_method=ranking,
    )  # fmt: skip


def prune(schedule: PruningSchedule, epoch: int, options: argparse.Namespace) -> None:
    """Do the round that is due at an epoch, if any, in all processes alike."""
    set_seeds(options.seed, epoch)  # the same in every process, for --method random
    try:
        schedule.step(epoch)
    except RuntimeError as error:
        fail(str(error))


def build(options: argparse.Namespace, classes: int, state: dict | None) -> nn.Module:
    """Return the model to train, with the weights that it starts from."""
    set_seeds(options.seed)
    from_disk = None if state else options.checkpoint  # a state brings its own weights
    model = load_model(
        options.model, pretrained=options.pretrained and not state, checkpoint=from_disk,
        num_classes=classes, **options.model_kwargs,
    )  # fmt: skip
    try:
        if options.method == UNITS:
            torch_dimap.group_units(model)
        else:
            torch_dimap.group_parameters(model)
    except ValueError as error:
        fail(str(error))
    return model.to(options.device)


def prepare(
    model: nn.Module, loader: DataLoader, options: argparse.Namespace,
    schedule: PruningSchedule | None, state: dict | None, ema: ModelEmaV3 | None,
) -> Training:  # fmt: skip
    """Build what goes by the names and order of the weights of a pruned model.

    The average only if there is none yet.
    """
    optimizer = create_optimizer_v2(
        model, options.opt, lr=options.lr, weight_decay=options.weight_decay
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=options.epochs - options.warmup_epochs,
        min_lr=options.min_lr, warmup_lr=options.warmup_lr, warmup_epochs=options.warmup_epochs,
        warmup_prefix=True, step_on_epochs=False,
        updates_per_epoch=updates_per_epoch(loader, options),
    )  # fmt: skip
    scaler = torch.amp.GradScaler(options.device, enabled=options.amp == "float16")
    if ema is None and options.ema_decay:
        ema = ModelEmaV3(model, decay=options.ema_decay)
    training = Training(model, optimizer, scheduler, scaler, ema, schedule)
    if state:
        training.load_state_dict(spread(state, model, optimizer) if options.fsdp else state)
    return training


def shard_all(model: nn.Module, options: argparse.Namespace) -> ModelEmaV3 | None:
    """Shard the model, and its average, which cannot be copied from a sharded one."""
    average = None
    if options.ema_decay:
        average = ModelEmaV3(model, decay=options.ema_decay, foreach=False)  # not all are shards
        pruning_schedule(shard(average.module, options.device), options)
    shard(model, options.device)
    return average


def save(training: Training, options: argparse.Namespace) -> None:
    """Write the state, then the log that it holds: in the first process, with all others' help."""
    state = {**training.state_dict(), "options": kept_options(options, FREE)}
    state = whole(state) if options.fsdp else state
    if dist.is_initialized() and dist.get_rank():
        return
    options.output.mkdir(parents=True, exist_ok=True)
    with whole_or_not_at_all(options.output / "last.pth") as file:
        torch.save(state, file)
    with whole_or_not_at_all(options.output / "log.csv", "w") as file:
        write_csv(training.log, file)


def run(options: argparse.Namespace) -> None:
    rank, world = start_processes(options)
    if options.fsdp and not dist.is_initialized():
        fail("--fsdp shards over processes: start it with torchrun, see --help.")
    state = None
    if options.resume:
        state = read_state(options.output / "last.pth", options, FREE)
    else:
        claim_new(options.output)
    train, test, classes = open_splits(options)
    model = build(options, classes, state)
    set_transforms(train, test, model, options, options.augmentation, options.scale)
    loader = training_loader(train, options, rank, world)
    if updates_per_epoch(loader, options) == 0:
        fail(f"{len(train)} training images fill no step: lower --batch-size or --accumulate.")
    ema = shard_all(model, options) if options.fsdp else None
    schedule = pruning_schedule(model, options)
    if schedule and not state:
        prune(schedule, 0, options)
    if options.reconstruct and not state:
        reconstruct_alike(model, train, test, options)
        if ema is not None:
            ema.set(model)
    training = prepare(model, loader, options, schedule, state, ema)
    forward = model if world == 1 or options.fsdp else DistributedDataParallel(
        model, device_ids=[torch.cuda.current_device()] if options.device == "cuda" else None
    )  # fmt: skip
    mixup = None
    if options.augmentation == "swin":
        mixup = Mixup(0.8, 1.0, label_smoothing=options.smoothing, num_classes=classes)
    about = provenance(options.device)
    top1 = training.log[-1]["top1"] if training.log else float("nan")
    while training.epochs_done < options.epochs:
        epoch = training.epochs_done
        if schedule:
            prune(schedule, epoch, options)
        loss, top1, speed = run_epoch(
            training, forward, loader, test, options, mixup,
            f"epoch {epoch + 1}/{options.epochs}, top-1 {top1:.2f}",
        )  # fmt: skip
        gone = sum(int(total((mask == 0).sum())) for mask in masks(model).values())
        training.log.append({
            "method": options.method if options.amount else "dense", "amount": options.amount,
            "reconstruct": options.reconstruct,
            "seed": options.seed, "epoch": epoch + 1, "loss": loss, "top1": top1, "zeros": gone,
            "lr": training.optimizer.param_groups[0]["lr"],
            "images_per_second": round(speed, 1), **about,
        })  # fmt: skip
        save(training, options)
        if rank == 0:
            print(f"epoch {epoch + 1}/{options.epochs}: loss {loss:.4f}, top-1 {top1:.2f} %, "
                  f"{speed:.0f} images/s", flush=True)  # fmt: skip
    weights = whole(torch_dimap.remove_all(training.tested).state_dict())
    if rank == 0:
        save_weights(weights, options.output / "model.safetensors")
        print(f"top-1 {top1:.2f} %; baked model: {options.output / 'model.safetensors'}")
        if options.method == UNITS and options.amount:
            slim = options.output / "slim.safetensors"
            save_model(torch_dimap.remove_units(training.tested), slim)
            print(f"without the units that are gone: {slim}")


def main() -> None:
    options = parse()
    try:
        run(options)
    except KeyboardInterrupt:
        print("\nfinetune: stopped; --resume goes on after the last whole epoch.", file=sys.stderr)
        sys.exit(130)
    except (OSError, FloatingPointError) as error:
        fail(f"{str(error).strip().splitlines()[-1]}; --resume goes on after the last whole epoch.")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
