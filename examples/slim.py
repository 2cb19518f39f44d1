"""Make a timm model fast without training: whole heads and neurons go, the rest is refitted.

    python examples/slim.py swin_tiny_patch4_window7_224 --pretrained --images FOLDER \\
        --latency 0.6 --output slim.safetensors

masks units until the model takes 60 % of its time, measured on this machine, refits what is
kept on 256 of the images (no labels), cuts the units out and saves what is left. Then
torch_dimap.load_pruned(timm.create_model(NAME), FILE) gives the slim model. Every layer keeps
at least one head and one block of neurons. Run it on an idle machine where times matter.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from images import add_loading_arguments, count_correct, open_split, test_loader
from models import (
    add_model_kwargs_argument,
    add_weights_arguments,
    fail,
    load_model,
    whole_or_not_at_all,
)
from provenance import machine_name
from prune_timm import find_images, read_some, reconstruct
from speed import take_times
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import torch_dimap


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm name")
    add_weights_arguments(parser)
    add_model_kwargs_argument(parser)
    goal = parser.add_mutually_exclusive_group(required=True)
    for name, what in (
        ("latency", "the share of the time of a forward to keep, measured"),
        ("flops", "the share of the multiply-adds to keep, counted"),
        ("amount", "the share of the heads and of the neurons to remove"),
    ):
        goal.add_argument(f"--{name}", type=float, metavar="A", help=f"{what}, 0 to 1")
    add("--images", type=Path, metavar="DIR",
        help="images of the kind that the model is for, in any subfolders, without labels")
    add("--reconstruct", type=int, default=256, metavar="N",
        help="refit the kept weights on N of the images; 0: leave them (default: 256)")
    add("--validation", type=Path, metavar="DIR",
        help="DIR/CLASS/IMAGE: also measure top-1, dense, masked and reconstructed")
    add("--output", type=Path, required=True, metavar="FILE", help="for load_pruned")
    add("--onnx", type=Path, metavar="FILE", help="also export it, for batches of any size")
    add("--force", action="store_true", help="replace these files if they exist")
    add("--time-batch", type=int, default=1, metavar="N",
        help="images in a forward that is timed (default: 1)")
    add("--rounds", type=int, default=25, metavar="N",
        help="forwards of each model for the times in the table (default: 25)")
    add_loading_arguments(parser)
    options = parser.parse_args()
    for name in ("latency", "flops", "amount"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1:
            parser.error(f"--{name} must lie between 0 and 1, found {value}")
    if options.reconstruct < 0:
        parser.error(f"--reconstruct must be a number of images or 0, found {options.reconstruct}")
    if options.reconstruct and not options.images:
        parser.error("--images must name a folder to reconstruct from; --reconstruct 0 leaves "
                     "the kept weights as they are")  # fmt: skip
    for name in ("time_batch", "rounds", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def check_files(options: argparse.Namespace) -> None:
    """End the script before the long work if its results could not be written."""
    taken = [options.checkpoint] if options.checkpoint else []
    for path in filter(None, (options.output, options.onnx)):
        if not path.resolve().parent.is_dir():
            fail(f"there is no folder {path.resolve().parent}.")
        if path.is_dir() or path.resolve() in [other.resolve() for other in taken]:
            fail(f"{path} is {'a folder' if path.is_dir() else 'in use'}: name another file.")
        if path.exists() and not options.force:
            fail(f"{path} exists: name another file, or give --force to replace it.")
        taken.append(path)
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if options.onnx and missing:
        fail(f"--onnx needs {missing[0]}: pip install 'torch_dimap[export]'.")


def open_validation(
    model: nn.Module, transform: Callable, options: argparse.Namespace
) -> DataLoader | None:
    """Return the labelled images, if there are any, in classes that the model tells apart."""
    if options.validation is None:
        return None
    folder = options.validation.resolve()
    data = open_split(argparse.Namespace(dataset=None, data=folder.parent), folder.name)
    if len(data.classes) != model.num_classes:
        fail(f"--validation must hold the {model.num_classes} classes of the model, one folder "
             f"each, found {len(data.classes)}; --model-kwargs num_classes=N builds another "
             "model.")  # fmt: skip
    data.transform = transform
    return test_loader(data, options)


def mask_units(model: nn.Module, image: Tensor, options: argparse.Namespace) -> None:
    """Mask whole heads and neurons until what the command line asks for is met."""
    if options.amount is not None:
        units = torch_dimap.group_units(model)
        torch_dimap.global_module_aware_structured(units, amount=options.amount)
    elif options.flops is not None:
        torch_dimap.prune_units_to_flops(model, image, options.flops)
    else:
        batch = image.repeat(options.time_batch, 1, 1, 1)
        print("Searching: copies of the model are timed in turns with a dense one ...", flush=True)
        budget = torch_dimap.prune_units_to_latency(
            model, batch, options.latency, options.device
        )
        print(f"Found: {budget.reached / budget.dense:.1%} of the dense model's time.")


def top1(model: nn.Module, loader: DataLoader, options: argparse.Namespace) -> float:
    bar = tqdm(loader, desc="top-1", unit="batch", leave=False, disable=None)
    return 100 * count_correct(model, bar, options) / len(loader.dataset)


def measures(model: nn.Module, image: Tensor) -> dict[str, float]:
    """Return what does not depend on the machine."""
    units = torch_dimap.group_units(model)
    return {
        **{kind: sum(layer.units for layer in layers) for kind, layers in units.items()},
        "parameters, M": sum(p.numel() for p in model.parameters()) / 1e6,
        "multiply-adds, M": torch_dimap.count_flops(model, image).dense / 1e6,
        "megabytes": sum(t.nbytes for t in model.state_dict().values()) / 1e6,
    }


def table(rows: dict[str, tuple[float, float]]) -> str:
    """Lay out every measure before and after, and the part of it that is left."""

    def number(name: str, value: float) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"

    lines = [f"{'':<24}{'dense':>12}{'slim':>12}{'left':>9}"]
    for name, (before, after) in rows.items():
        left = f"{after - before:+.2f}" if name.startswith("top-1") else f"{after / before:.1%}"
        lines.append(f"{name:<24}{number(name, before):>12}{number(name, after):>12}{left:>9}")
    return "\n".join(lines)


def to_onnx(model: nn.Module, image: Tensor) -> bytes:
    """Return the model as an ONNX file for batches of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            model, (torch.cat([image, image]),), dynamo=True, verbose=False, input_names=["image"],
            output_names=["logits"], dynamic_shapes=[{0: torch.export.Dim("batch")}],
        )  # fmt: skip
    return program.model_proto.SerializeToString()


def main() -> None:
    options = parse()
    check_files(options)
    images = find_images(options.images) if options.reconstruct else []
    dense = load_model(
        options.model, pretrained=options.pretrained, checkpoint=options.checkpoint,
        **options.model_kwargs,
    ).eval().to(options.device)  # fmt: skip
    if options.random_init:
        print("Weights: random. The table is about sizes and times only.")
    config = timm.data.resolve_data_config(
        {**options.model_kwargs, **options.data_kwargs}, model=dense
    )
    transform = timm.data.create_transform(**config, is_training=False)
    image = torch.zeros(1, *config["input_size"], device=options.device)
    validation = open_validation(dense, transform, options)
    batches = read_some(images, options.reconstruct, transform)

    model = copy.deepcopy(dense)
    mask_units(model, image, options)
    accuracy = {}
    if validation:
        before = top1(dense, validation, options)
        accuracy["top-1, one-shot"] = before, top1(model, validation, options)
    if batches:
        reconstruct(model, batches)
        if validation:
            accuracy["top-1, reconstructed"] = before, top1(model, validation, options)
    torch_dimap.remove_units(model)

    rows = {}
    after = measures(model, image)
    for name, value in measures(dense, image).items():
        rows[name] = value, after.get(name, 0)
    batch = image.repeat(options.time_batch, 1, 1, 1)
    times = take_times([dense, model], batch, options)
    milliseconds = [1000 * statistics.median(own) for own in times]
    rows["milliseconds"] = milliseconds[0], milliseconds[1]
    model.cpu()
    exported = to_onnx(model, image.cpu()) if options.onnx else b""
    torch_dimap.save_pruned(model, options.output, force=options.force)
    if options.onnx:
        with whole_or_not_at_all(options.onnx) as file:
            file.write(exported)
    print(table({**rows, **accuracy}))
    print(f"milliseconds: medians of {options.rounds} forwards of {options.time_batch} x "
          f"{'x'.join(map(str, image.shape[1:]))}, dense and slim in turns, on "
          f"{machine_name(options.device)}.")  # fmt: skip
    for path in filter(None, (options.output, options.onnx)):
        print(f"Written: {path} ({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        fail(str(error))
