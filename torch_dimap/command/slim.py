"""The command ``slim``: whole heads and neurons removed from a model, written and exported."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.accounting import count_flops
from torch_dimap.command.files import amount_of
from torch_dimap.command.models import add_source, image_for, open_model
from torch_dimap.files import save_pruned
from torch_dimap.storage import check_target
from torch_dimap.text import aligned
from torch_dimap.units import count_units, global_module_aware_structured, group_units, remove_units

NOTE = """\
multiply-adds: counted as they are computed, for one image of {image}.
bytes: before, of the model's tensors; after, of {target}.
Accuracy falls with what is removed: fine-tune the model that load_pruned gives."""


def add_slim(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``slim``."""
    add_source(parser)
    parser.add_argument(
        "target", metavar="OUT", help="the safetensors file to write, for load_pruned"
    )
    for kind, what in (("heads", "attention heads"), ("neurons", "MLP neurons")):
        parser.add_argument(
            f"--{kind}",
            type=amount_of,
            default=0.0,
            metavar="A",
            help=f"how many {what} go: with a point or a percent sign, the share of those in the "
            "model (0.5, 50%%); without, their number (default: none)",
        )
    parser.add_argument(
        "--multiple",
        type=int,
        default=16,
        metavar="N",
        help="keep neurons in multiples of N, which run faster (default: %(default)s)",
    )
    parser.add_argument(
        "--onnx",
        metavar="FILE",
        help="also export the slim model to FILE, for batches of any size "
        "(needs: pip install 'torch_dimap[export]')",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT and FILE if they exist")
    parser.epilog = """\
The units that matter least by their weights go. A model of timm is given by its name; a file
by its path, and --model with the name of the model that its weights are of.

examples:
  torch-dimap slim vit_small_patch16_224 slim.safetensors --pretrained --heads 0.25 --neurons 0.5
  torch-dimap slim swin.pth slim.safetensors --model swin_tiny_patch4_window7_224 \\
      --neurons 0.5 --onnx slim.onnx

to use it:
  model = torch_dimap.load_pruned(timm.create_model(NAME), "slim.safetensors")"""


def slim(arguments: argparse.Namespace) -> str:
    """Remove units of a model, write what is left, and tell what that is beside the whole."""
    amounts = {kind: getattr(arguments, kind) for kind in ("heads", "neurons")}
    if not any(amounts.values()):
        raise ValueError(
            "nothing is to go: give --heads, --neurons or both, such as --heads 0.25 --neurons 0.5."
        )
    taken = [Path(arguments.source)] if os.path.exists(arguments.source) else []
    target = check_target(arguments.target, "slim", arguments.force, taken)
    if arguments.onnx:
        exported = check_target(arguments.onnx, "slim", arguments.force, taken)
        if exported == target:
            raise ValueError(f"OUT and --onnx must be two files, found {target} as both.")
        _need_exporter()
    model = open_model(arguments)
    image = image_for(model, arguments)
    units = group_units(model)
    absent = [kind for kind, amount in amounts.items() if amount and kind not in units]
    if absent:
        raise ValueError(
            f"the {absent[0]} of {type(model).__name__} cannot be removed: leave --{absent[0]} out."
        )
    before = _measures(model, image)
    asked = {kind: amounts[kind] for kind in units if amounts[kind]}
    global_module_aware_structured(
        {kind: units[kind] for kind in asked}, asked, multiple=arguments.multiple
    )
    remove_units(model)
    program = export(model, image) if arguments.onnx else None
    save_pruned(model, target, force=arguments.force)
    if program is not None:
        program.save(exported)
    after = _measures(model, image) | {"bytes": os.path.getsize(target)}
    note = NOTE.format(image="x".join(map(str, image.shape[1:])), target=arguments.target)
    return "\n".join([*_table(before, after), "", note])


def export(model: nn.Module, image: Tensor) -> Any:
    """Return a model as an ONNX program for batches of any size."""
    batch = torch.export.Dim("batch")
    return torch.onnx.export(
        model.eval(), (image.repeat(2, 1, 1, 1),), dynamo=True, verbose=False,
        input_names=["image"], output_names=["logits"], dynamic_shapes=({0: batch},),
    )  # fmt: skip


def _need_exporter() -> None:
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(
            f"--onnx needs {absent[0]}, which is not installed: pip install 'torch_dimap[export]'."
        )


def _measures(model: nn.Module, image: Tensor) -> dict[str, int]:
    counts = count_units(model)
    kinds = dict.fromkeys(count.kind for count in counts)
    return {
        **{kind: sum(count.units for count in counts if count.kind == kind) for kind in kinds},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply-adds": count_flops(model, image).dense,
        "bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
    }


def _table(before: dict[str, int], after: dict[str, int]) -> Sequence[str]:
    rows = [
        [name, f"{count:,}", f"{after[name]:,}", f"{after[name] / max(1, count):.1%}"]
        for name, count in before.items()
    ]
    return aligned([["", "before", "after", "left"], *rows], left=1)
