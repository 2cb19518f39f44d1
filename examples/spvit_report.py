"""What SPViT gave: a table, and a picture of the architecture that one could print."""

from __future__ import annotations

import argparse

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from models import whole_or_not_at_all
from provenance import write_csv
from tables import as_table, results
from torch import nn
from torch.utils.data import Dataset

import torch_dimap
from torch_dimap.learning import replaced_attentions

# Dark to light, from the dearest operation to none, so that a grey print tells them apart too.
COLOURS = {"attention": "#1b3a57", "conv3": "#3f7f93", "conv1": "#9cc5a1", "skip": "#f2efe6"}
NAMES = {"attention": "attention", "conv3": "3x3 convolution", "conv1": "1x1 convolution",
         "skip": "nothing"}  # fmt: skip


def plot_architecture(dense: nn.Module, model: nn.Module) -> Figure:
    """Draw for each block what is in its attention's place, and how many neurons are left."""
    replaced = {name: made.operation for name, made in replaced_attentions(model).items()}
    names = [name for name, _ in dense.named_modules() if name.endswith(".attn")]
    widths = [_neurons(dense, name) for name in names]
    kept = [_neurons(model, name) for name in names]
    figure = Figure(figsize=(max(5, 1.5 + 0.5 * len(names)), 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 4))
    places = range(len(names))
    operations = [replaced.get(name, "attention") for name in names]
    above.bar(places, [1] * len(names), 0.8, color=[COLOURS[x] for x in operations],
              edgecolor="#555555", linewidth=0.6)  # fmt: skip
    above.set(yticks=[], ylabel="attention")
    above.spines[:].set_visible(False)
    below.bar(places, widths, 0.8, color="#ececec", edgecolor="#555555", linewidth=0.6)
    below.bar(places, kept, 0.8, color="#d08c4f", edgecolor="#555555", linewidth=0.6)
    for place, width, left in zip(places, widths, kept):
        below.text(place, width * 1.02, str(left), ha="center", va="bottom", fontsize=7)
    below.set(ylabel="neurons", xlabel="block", xticks=list(places),
              xticklabels=[str(i + 1) for i in places])  # fmt: skip
    below.spines[["top", "right"]].set_visible(False)
    below.margins(y=0.12)
    patches = [Patch(facecolor=COLOURS[x], edgecolor="#555555", label=NAMES[x])
               for x in COLOURS if x in operations]  # fmt: skip
    patches += [Patch(facecolor="#d08c4f", edgecolor="#555555", label="neurons left"),
                Patch(facecolor="#ececec", edgecolor="#555555", label="neurons gone")]  # fmt: skip
    figure.legend(handles=patches, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def _neurons(model: nn.Module, attention: str) -> int:
    return model.get_submodule(attention.removesuffix(".attn")).mlp.fc1.out_features


def report(
    models: dict[str, nn.Module],
    test: Dataset,
    options: argparse.Namespace,
    about: dict[str, str],
) -> str:
    """Write results.csv, report.md and architecture.png to the run's folder; return the report.

    Args:
        models: name -> model; the first is the dense one.
        test: the test images.
        options: of the command line.
        about: where the figures come from.
    """
    rows = results(models, test, options)
    with whole_or_not_at_all(options.output / "results.csv", "w") as file:
        write_csv([{**row, "target": options.target, "control": options.control,
                    "start": options.start, "seed": options.seed, **about} for row in rows], file)
    lines = [f"# {options.model}, SPViT", "", as_table(rows)]
    if len(models) > 1:
        dense, *_, tuned = models.values()
        with whole_or_not_at_all(options.output / "architecture.png") as file:
            plot_architecture(dense, tuned).savefig(file, format="png", dpi=150)
        lines += ["", str(torch_dimap.summarize(tuned).note).strip(), "",
                  "![architecture](architecture.png)"]  # fmt: skip
    lines += ["", f"`{about['command']}`, on {about['machine']}, torch {about['torch']}, timm "
              f"{about['timm']}, commit {about['commit']}."]  # fmt: skip
    text = "\n".join(lines) + "\n"
    with whole_or_not_at_all(options.output / "report.md", "w") as file:
        file.write(text)
    return text
