"""SPViT: attentions of a timm ViT or Swin become convolutions or go, and neurons go, by training.

    python examples/spvit.py MODEL --pretrained --data FOLDER --target 0.65 --output DIR
    python examples/spvit.py ... --step search         then --step tune
    python examples/spvit.py ... --resume              after an interruption
    python examples/spvit.py ... --teacher MODEL       hard distillation while fine-tuning
    torchrun --nproc-per-node 8 examples/spvit.py ...  on eight GPUs

Two steps. search: gates on attentions and neurons are trained with the weights until the
share --target of the multiply-adds is left; DIR/found.json tells what was found. tune: the
model that was found is fine-tuned from the original weights, or from those of the search
(--start search); DIR/slim.safetensors holds it, with plain convolutions and without the
neurons that went: torch_dimap.load_pruned(timm.create_model(MODEL), FILE).

At the end: a table and a picture of the architecture (DIR/report.md, DIR/architecture.png).
DIR/log.csv has a row per epoch. --data digits takes scikit-learn's digits, without a download.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from models import fail, load_model, whole_or_not_at_all
from spvit_report import report
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
    updates,
)
from timm.utils import ParseKwargs
from torch import Tensor, nn
from training import Besides, set_seeds

import torch_dimap
from torch_dimap.learning import (
    SinglePath,
    SinglePathSearch,
    apply_single_path,
    collapse_convolutions,
)

# What is done to the architecture that was found, to see what in it matters.
CONTROLS = ("none", "neurons", "weights", "skip")
OPERATIONS = ("attention", "conv3", "conv1", "skip")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, STEPS)
    add = parser.add_argument
    add("--target", type=float, default=0.65, metavar="T",
        help="the share of the multiply-adds to come down to, 0 to 1 (default: 0.65)")
    add("--search-epochs", type=int, default=15, metavar="N",
        help="at most; a search that stands still at its target ends sooner (default: 15)")
    add("--search-lr", type=float, default=1e-4, metavar="LR", help="of weights (default: 1e-4)")
    add("--gate-lr", type=float, default=1e-3, metavar="LR", help="of gates (default: 1e-3)")
    add("--weight", type=float, metavar="W",
        help="a fixed weight of the squared distance from the target, both as shares of the "
        "dense cost, as the authors have it (default: a multiplier that holds the target)")
    add("--temperature", type=float, metavar="T",
        help="of the softmax over heads (default: 0.01 for ViTs, 100 for Swins)")
    add("--skip", choices=["zero", "norm"], default="zero",
        help="what a skipped attention gives: zeros, or as in the authors' fine-tuned models "
        "its normalised input (default: zero)")
    add("--operations", nargs="+", choices=OPERATIONS, metavar="OP",
        help="no search: these operations block by block, of attention, conv3, conv1 and skip, "
        "and all neurons")
    add("--start", choices=["original", "search"], default="original",
        help="the weights to fine-tune from (default: original)")
    add("--control", choices=CONTROLS, default="none",
        help="neurons: as many others, by chance; weights: convolutions of random weights; "
        "skip: nothing in the place of convolutions (default: none)")
    add("--teacher", metavar="MODEL", help="a timm name; its decisions count as labels too")
    add("--teacher-checkpoint", type=Path, metavar="FILE", help="(default: timm's weights)")
    add("--teacher-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE",
        help="for timm.create_model")
    add("--teacher-weight", type=float, default=0.5, metavar="W", help="(default: 0.5)")
    add("--tune-epochs", type=int, default=30, metavar="N", help="(default: 30)")
    add("--tune-lr", type=float, default=1e-4, metavar="LR", help="the first (default: 1e-4)")
    options = parser.parse_args(words)
    check_common_arguments(parser, options)
    if not 0 < options.target < 1:
        parser.error(f"--target must lie between 0 and 1, found {options.target}")
    if options.search_epochs < 1 or options.tune_epochs < 0:
        parser.error("--search-epochs must be at least 1, and --tune-epochs 0 or more")
    if options.operations and (options.start == "search" or options.step == "search"):
        parser.error("--operations leaves the search out: --start search and --step search need it")
    if options.start == "search" and options.control in ("neurons", "skip"):
        parser.error(f"--control {options.control} needs --start original, found search")
    if options.teacher_checkpoint and not options.teacher:
        parser.error("--teacher-checkpoint needs --teacher")
    return options


def open_search(job: Job, model: nn.Module) -> SinglePathSearch:
    options = job.options
    return SinglePathSearch(
        model, options.target, options.search_epochs * updates(job), options.weight,
        options.temperature,
    )  # fmt: skip


class Searched(nn.Module):
    """A model under search, and what of the search is not in it, for one state dict."""

    def __init__(self, model: nn.Module, search: SinglePathSearch) -> None:
        super().__init__()
        self.model = model
        self.search = search

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def get_extra_state(self) -> dict:
        return self.search.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.search.load_state_dict(state)


def search_path(job: Job) -> None:
    """Step 1: which operation for each attention, and which neurons?"""
    options = job.options
    model = build(options, job.classes)
    search = open_search(job, model)
    groups = [
        {"params": search.weights(), "lr": options.search_lr},
        {"params": search.gates(), "lr": options.gate_lr, "weight_decay": 0.0},
    ]
    learn(job, "search", Searched(model, search), model, groups, options.search_epochs,
          Besides(penalty=search.penalty, after_step=search.update),
          lambda: {"share": search.choices().share}, search.stands_still)  # fmt: skip
    found = search.choices()
    if job.rank == 0:
        if abs(found.share - options.target) > 0.02:
            remedy = "raise --weight" if options.weight else "give --search-epochs more"
            print(f"spvit: the search has not reached its target: {found.share:.3f} of the "
                  f"multiply-adds are left, not {options.target}; {remedy}, or --gate-lr.",
                  file=sys.stderr)  # fmt: skip
        told = {
            "operations": found.operations,
            "neurons": {name: int(keep.sum()) for name, keep in found.neurons.items()},
            "multiply-adds": found.flops,
            "share": found.share,
        }
        with whole_or_not_at_all(job.file("search"), "w") as file:
            json.dump(told, file, indent=1)


def found_model(job: Job) -> nn.Module:
    """Return the model that was found, with the weights to fine-tune it from."""
    options = job.options
    model = build(options, job.classes)
    if options.operations:
        choices = given_choices(model, options.operations)
    else:
        search = open_search(job, model)
        state = torch.load(job.state("search"), map_location="cpu", weights_only=True)
        Searched(model, search).load_state_dict(state["model"])
        choices = search.choices()
    choices = controlled(choices, options.control, options.seed)
    if options.start == "search":
        search.finish(options.skip)
    else:
        model = build(options, job.classes)
        apply_single_path(model, choices, options.skip, options.temperature)
    if options.control == "weights":
        for module in torch_dimap.learning.replaced_attentions(model).values():
            for layer in module.children():
                layer.reset_parameters()
    return torch_dimap.remove_units(model).to(options.device)


def given_choices(model: nn.Module, operations: list[str]) -> SinglePath:
    """Return choices of given operations, with all neurons."""
    search = SinglePathSearch(model, 0.99, steps=1)
    dense = search.choices()
    if len(operations) != len(dense.operations):
        fail(f"--operations must name {len(dense.operations)} blocks, found {len(operations)}.")
    return dense._replace(operations=dict(zip(dense.operations, operations)))


def controlled(choices: SinglePath, control: str, seed: int) -> SinglePath:
    """Change what was found, for a comparison."""
    generator = torch.Generator().manual_seed(seed)
    if control == "neurons":
        others = {name: keep[torch.randperm(len(keep), generator=generator)]
                  for name, keep in choices.neurons.items()}  # fmt: skip
        return choices._replace(neurons=others)
    if control == "skip":
        bare = {name: "skip" if op.startswith("conv") else op
                for name, op in choices.operations.items()}  # fmt: skip
        return choices._replace(operations=bare)
    return choices


def teacher(job: Job) -> Besides:
    """Return what a teacher adds to the training, if there is one."""
    options = job.options
    if not options.teacher:
        return Besides()
    wise = load_model(
        options.teacher, pretrained=not options.teacher_checkpoint,
        checkpoint=options.teacher_checkpoint, num_classes=job.classes, **options.teacher_kwargs,
    ).to(options.device).eval()  # fmt: skip
    weight = options.teacher_weight

    def teach(loss: Tensor, images: Tensor, outputs: Tensor) -> Tensor:
        with torch.no_grad():
            decided = wise(images).argmax(1)
        return (1 - weight) * loss + weight * F.cross_entropy(outputs.float(), decided)

    return Besides(teach=teach)


def tune(job: Job) -> None:
    """Step 2: fine-tune what was found."""
    options = job.options
    model = found_model(job)
    set_seeds(options.seed)
    learn(job, "tune", model, model, [{"params": list(model.parameters()),
                                       "lr": options.tune_lr}],
          options.tune_epochs, teacher(job))  # fmt: skip
    if job.rank == 0:
        save_slim(job, collapse_convolutions(model.eval()), job.file("tune"))


STEPS = {
    "search": Step(search_path, "found.json",
                   ("target", "search_epochs", "search_lr", "gate_lr", "weight", "temperature")),
    "tune": Step(tune, "slim.safetensors",
                 ("skip", "operations", "start", "control", "teacher", "teacher_checkpoint",
                  "teacher_kwargs", "teacher_weight", "tune_epochs", "tune_lr")),
}  # fmt: skip


def models_of(job: Job) -> dict[str, nn.Module]:
    """Return the dense model, and what the steps have made of it."""
    models = {"dense": build(job.options, job.classes)}
    if job.file("tune").is_file():
        dense = build(job.options, job.classes)
        models["fine-tuned"] = torch_dimap.load_pruned(dense, job.file("tune"))
    return models


def run(options: argparse.Namespace) -> Job:
    """Do the steps that are asked for."""
    needed = ["tune"] if options.operations else list(STEPS)
    names = steps_to_do(STEPS, needed, options)
    job = open_job(STEPS, options)
    run_steps(job, names)
    return job


def main(words: list[str] | None = None) -> None:
    options = parse(words)

    def work() -> None:
        job = run(options)
        if job.rank == 0:
            print(report(models_of(job), job.test, options, job.about))

    main_of("spvit", work)


if __name__ == "__main__":
    main()
