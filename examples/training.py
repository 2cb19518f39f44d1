"""Train for an epoch, in one process or several; keep what a later run needs to go on."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from images import autocast, count_correct, test_loader, unlabelled_batches
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import torch_dimap
from torch_dimap import PruningSchedule


@dataclass
class Training:
    """What changes while a model is trained."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    schedule: PruningSchedule | None = None
    epochs_done: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)  # a row per epoch

    @property
    def tested(self) -> nn.Module:
        """The model whose accuracy counts."""
        return self.ema.module if self.ema else self.model

    def state_dict(self) -> dict[str, Any]:
        # The scheduler's state is a function of the number of updates: it needs no saving.
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "epochs_done": self.epochs_done,
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        self.epochs_done, self.log = state["epochs_done"], state["log"]


@dataclass
class Besides:
    """What a method does in an epoch besides training on the labels."""

    around: Callable[[Tensor], AbstractContextManager] = lambda labels: contextlib.nullcontext()
    penalty: Callable[[], Tensor | float] = lambda: 0.0  # is added to the loss
    after_step: Callable[[], None] = lambda: None
    frozen: bool = False  # the model stays in evaluation mode, and is not tested
    # What becomes of the loss, for images and outputs.
    teach: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda loss, images, outputs: loss


def start_processes(options: argparse.Namespace) -> tuple[int, int]:
    """Return this process's number and that of all, as torchrun set them."""
    if "RANK" not in os.environ:
        return 0, 1
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def sum_over_processes(*values: float) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        total = total.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total)
    return total.tolist()


def set_seeds(*numbers: int) -> None:
    """Seed all generators from the run's seed, the epoch and the process.

    Every epoch begins so; that is why a resumed run needs no saved random state.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def reconstruct_alike(
    model: nn.Module, train: Dataset, test: Dataset, options: argparse.Namespace
) -> None:
    """Refit the kept weights, in every process to the same values."""
    batches = unlabelled_batches(
        train, options.reconstruct, options.batch_size, test.transform, options.seed
    )
    if options.fsdp:  # processes that share a model share the images, too
        rank, world = dist.get_rank(), dist.get_world_size()
        batches = share_of(torch.cat(batches), rank, world, options.batch_size)
    torch_dimap.reconstruct(model, batches)
    if dist.is_initialized() and not options.fsdp:  # on GPUs sums may differ in their last bits
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)


def share_of(images: torch.Tensor, rank: int, world: int, size: int) -> list[torch.Tensor]:
    """Return the batches of one process: in each as many, about of a size, and none empty.

    Where there are fewer images than processes, each has all of them.
    """
    least = len(images) // world
    own = images[rank::world] if least else images
    return list(own.tensor_split(math.ceil(max(1, least) / size)))


def updates_per_epoch(loader: DataLoader, options: argparse.Namespace) -> int:
    return len(loader) // options.accumulate


def train_epoch(
    training: Training,
    forward: nn.Module,
    loader: DataLoader,
    options: argparse.Namespace,
    mixup: timm.data.Mixup | None,
    bar: tqdm,
    besides: Besides = Besides(),
) -> float:
    """Train for one epoch and return the mean loss of this process.

    Args:
        training: what is trained.
        forward: its model, sharded or not, or that in DistributedDataParallel.
        loader: batches of images and labels; those that fill no step are left out.
        mixup: mixes a batch and smooths its targets.
        bar: shows the images of all processes.
        besides: what else goes on.
    """
    updates = updates_per_epoch(loader, options)
    done = training.epochs_done * updates
    total = torch.zeros((), dtype=torch.float64, device=options.device)
    forward.train(not besides.frozen)
    for i, (images, labels) in enumerate(itertools.islice(loader, updates * options.accumulate)):
        images = images.to(options.device, non_blocking=True)
        labels = labels.to(options.device, non_blocking=True)
        if mixup:
            images, labels = mixup(images, labels)
        smoothing = 0.0 if mixup else options.smoothing
        step_now = (i + 1) % options.accumulate == 0
        waits = isinstance(forward, DistributedDataParallel) and not step_now
        with forward.no_sync() if waits else contextlib.nullcontext():
            with besides.around(labels):
                with autocast(options):
                    outputs = forward(images)
                loss = F.cross_entropy(outputs.float(), labels, label_smoothing=smoothing)
                loss = besides.teach(loss, images, outputs) + besides.penalty()
                training.scaler.scale(loss / options.accumulate).backward()
        total += loss.detach()
        if step_now:
            training.scaler.step(training.optimizer)
            training.scaler.update()
            training.optimizer.zero_grad()
            done += 1
            training.scheduler.step_update(done)
            besides.after_step()
            if training.ema:
                training.ema.update(training.model, step=done)
        bar.update(len(images) * (dist.get_world_size() if dist.is_initialized() else 1))
        if i % 20 == 0:
            bar.set_postfix(loss=f"{float(total) / (i + 1):.3f}", refresh=False)
    mean = float(total) / (updates * options.accumulate)
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss of epoch {training.epochs_done + 1} is {mean}")
    return mean


def run_epoch(
    training: Training,
    forward: nn.Module,
    loader: DataLoader,
    test: Dataset,
    options: argparse.Namespace,
    mixup: timm.data.Mixup | None,
    title: str,
    besides: Besides = Besides(),
) -> tuple[float, float, float]:
    """Train for an epoch over all processes, and test.

    Returns:
        The mean loss, top-1 in percent (not a number where nothing is tested), and images per
        second of training.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    set_seeds(options.seed, training.epochs_done, rank)
    loader.sampler.set_epoch(training.epochs_done)
    images = updates_per_epoch(loader, options) * options.accumulate * options.batch_size
    bar = tqdm(total=images * world, unit=" images", disable=rank > 0, leave=False, desc=title)
    start = time.perf_counter()
    with bar:
        loss = train_epoch(training, forward, loader, options, mixup, bar, besides)
    seconds = time.perf_counter() - start
    correct = math.nan
    if not besides.frozen:
        share = test_loader(test, options, rank, world)
        most = math.ceil(math.ceil(len(test) / world) / options.batch_size)  # of any process
        correct = count_correct(training.tested, share, options, forwards=most)
    loss, correct = sum_over_processes(loss / world, correct)
    training.epochs_done += 1
    return loss, 100 * correct / len(test), images * world / seconds
