"""What X-Pruner-style pruning gave: a table, the tests of faithfulness, and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from faithfulness import deletion, leakage, probe_loader, summarize_deletion
from models import whole_or_not_at_all
from provenance import write_csv
from tables import as_table, results
from torch import nn
from torch.utils.data import Dataset
from xpruner_figures import plot_all

import torch_dimap
from torch_dimap.learning import ClassMasks


def explain(
    dense: nn.Module, state: dict, test: Dataset, classes: int, options: argparse.Namespace
) -> list[str]:
    """Test the masks as an explanation and draw them; return the lines of the report."""
    dense.eval()
    loader = probe_loader(test, options)
    with ClassMasks(dense, torch_dimap.group_units(dense), classes) as masks:
        masks.load_state_dict(state)
        leaks = leakage(dense, masks, loader, options)
    rows = deletion(dense, masks, loader, options)
    with whole_or_not_at_all(options.output / "deletion.csv", "w") as file:
        write_csv(rows, file)
    names = plot_all(dense, masks, test, options)
    return [
        "",
        "## Is it an explanation?",
        f"Of {len(loader.dataset)} test images. Accuracy with the right label fed to the masks is "
        "no accuracy: they carry the label.",
        "",
        as_table([{"the prediction, when the masks are": key, "%": value}
                  for key, value in leaks.items()]),
        "",
        "Points of accuracy lost when units are deleted, means over the classes with standard "
        "errors: on the class in question, on the others, the difference, and by how much "
        "further the class falls when the units *for the class* are deleted instead.",
        "",
        as_table(summarize_deletion(rows), left=2),
        "",
        *(f"![{name}]({name})" for name in names),
    ]  # fmt: skip


def report(
    models: dict[str, nn.Module],
    masks: dict | None,
    test: Dataset,
    classes: int,
    options: argparse.Namespace,
    about: dict[str, str],
) -> str:
    """Write results.csv, report.md and the pictures to the run's folder; return the report.

    Args:
        models: name -> model; the first is the dense one.
        masks: the state of the class masks, if there are any.
        test: the test images.
        classes: how many classes the model tells apart.
        options: of the command line.
        about: where the figures come from.
    """
    torch.manual_seed(options.seed)
    rows = results(models, test, options)
    with whole_or_not_at_all(options.output / "results.csv", "w") as file:
        write_csv([{**row, "seed": options.seed, **about} for row in rows], file)
    lines = [f"# {options.model}, X-Pruner-style", "", as_table(rows)]
    if masks is not None and options.probe_images and not options.classes:
        lines += explain(next(iter(models.values())), masks, test, classes, options)
    lines += ["", f"`{about['command']}`, on {about['machine']}, torch {about['torch']}, timm "
              f"{about['timm']}, commit {about['commit']}."]  # fmt: skip
    text = "\n".join(lines) + "\n"
    with whole_or_not_at_all(Path(options.output, "report.md"), "w") as file:
        file.write(text)
    return text
