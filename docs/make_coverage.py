"""Make docs/coverage.csv and docs/coverage.md from the installed libraries (2 minutes).

    python docs/make_coverage.py

For every family the smallest model is built on the meta device, without weights, and its
parameters are grouped. Needs timm, torchvision and transformers.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import torch_dimap
from torch_dimap.units import units_left_out

TABLE = Path(__file__).with_name("coverage.csv")
PAGE = Path(__file__).with_name("coverage.md")
GROUPS = ("qkv", "proj", "mlp")
UNITS = ("heads", "neurons")
COLUMNS = (
    "library", "version", "family", "model", "parameters", *GROUPS, "warns", *UNITS, "units_stay",
)  # fmt: skip

# timm's modules that hold several families: family -> (module, names, names to leave out)
SPLIT = {
    "swin": ("swin_transformer", "swin_*", "swin_s3*"),
    "swin_s3": ("swin_transformer", "swin_s3*", ""),
    "swinv2": ("swin_transformer_v2", "*", ""),
    "swinv2_cr": ("swin_transformer_v2_cr", "*", ""),
    "maxvit": ("maxxvit", "maxvit*", ""),
    "maxxvit": ("maxxvit", "maxxvit*", ""),
    "coatnet": ("maxxvit", "coatnet*", ""),
    "coatnext": ("maxxvit", "coatnext*", ""),
    "mobilevit": ("mobilevit", "mobilevit_*", ""),
    "mobilevitv2": ("mobilevit", "mobilevitv2*", ""),
    "vit": ("vision_transformer", "vit_*", ""),
    "deit": ("deit", "deit_*", ""),
    "deit3": ("deit", "deit3*", ""),
    "beit": ("beit", "beit_*", ""),
    "beitv2": ("beit", "beitv2*", ""),
    "eva02": ("eva", "eva02*", ""),
}
TORCHVISION = ("swin_t", "swin_v2_t", "vit_b_16", "maxvit_t")
TRANSFORMERS = (
    "SwinModel",
    "Swinv2Model",
    "ViTModel",
    "PvtV2Model",
    "PvtModel",
    "SegformerModel",
    "HieraModel",
    "CvtModel",
    "DeiTModel",
    "BeitModel",
    "Dinov2Model",
    "SiglipVisionModel",
)


def build(library: str, name: str) -> nn.Module:
    """Build a model without weights."""
    with torch.device("meta"):
        if library == "timm":
            import timm

            return timm.create_model(name)
        if library == "torchvision":
            import torchvision

            return getattr(torchvision.models, name)()
        import transformers

        model_class = getattr(transformers, name)
        return model_class(model_class.config_class())


def row(library: str, family: str, name: str) -> dict[str, str]:
    """Count a model's weights by group; the counts are empty where it is refused."""
    model = build(library, name)
    counts = dict.fromkeys(GROUPS, "")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            groups = torch_dimap.group_parameters(model)
        except ValueError:
            groups = {}
    for group, pairs in groups.items():
        counts[group] = str(sum(getattr(*pair).numel() for pair in pairs))
    return {
        "library": library,
        "version": version(library),
        "family": family,
        "model": name,
        "parameters": str(sum(p.numel() for p in model.parameters())),
        **counts,
        "warns": "yes" if any("group_parameters" in str(w.message) for w in caught) else "",
        **units(model),
    }


def units(model: nn.Module) -> dict[str, str]:
    """Count the units that can be removed, and say why others cannot."""
    counts = dict.fromkeys(UNITS, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            groups = torch_dimap.group_units(model)
        except ValueError:
            groups = {}
    for kind, layers in groups.items():
        counts[kind] = str(sum(layer.units for layer in layers))
    # Layers of one name but for their numbers stay for one reason.
    reasons = dict.fromkeys(re.sub(r"(?<=\.)\d+", "*", reason) for reason in units_left_out(model))
    return {**counts, "units_stay": "; ".join(reasons)}


def smallest(names: list[str]) -> str:
    """Return the model with the fewest parameters."""
    sizes = {}
    for name in names:
        try:
            sizes[name] = sum(p.numel() for p in build("timm", name).parameters())
        except (OSError, RuntimeError, ImportError):  # what only a download would build
            continue
    return min(sizes, key=sizes.__getitem__)


def rows() -> Iterator[dict[str, str]]:
    import timm

    whole = {module: (module, "*", "") for module in timm.list_modules()}
    for module in {module for module, _, _ in SPLIT.values()}:
        del whole[module]
    for family, (module, names, but) in sorted({**SPLIT, **whole}.items()):
        models = timm.list_models(names, module=module, exclude_filters=[but, "test_*"])
        if models:
            yield row("timm", family, smallest(models))
    for library, listed in (("torchvision", TORCHVISION), ("transformers", TRANSFORMERS)):
        for name in listed:
            yield row(library, name, name)


def read() -> list[dict[str, str]]:
    """Return the rows of the table as it is."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def page(table: list[dict[str, str]]) -> str:
    """Write the table as a page of the documentation."""
    versions = ", ".join(dict.fromkeys(f"{r['library']} {r['version']}" for r in table))
    grouped = [r for r in table if any(r[group] for group in GROUPS)]
    refused = [r["family"] for r in table if r not in grouped]
    lines = [
        "# Coverage",
        "",
        f"Made by `docs/make_coverage.py` from {versions};",
        "do not edit. The smallest model of every family, its parameters, how many weights",
        "`group_parameters` puts into each group, and the share of all parameters that this is.",
        "\\*: less than half of the weights in the blocks are recognised, which gives a warning.",
        "The last two columns are the numbers of units that `group_units` finds and `remove_units`",
        "can remove; what it cannot is listed below.",
        "",
        "| library | family | smallest model | parameters | qkv | proj | mlp | grouped "
        "| heads | neurons |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in grouped:
        counts = [int(r[group] or 0) for group in GROUPS]
        share = sum(counts) / int(r["parameters"])
        numbers = " | ".join(f"{n:,}".replace(",", " ") for n in (int(r["parameters"]), *counts))
        lines.append(
            f"| {r['library']} | {r['family']} | {r['model']} | {numbers} "
            f"| {share:.1%}{' *' if r['warns'] else ''} | {r['heads'] or '–'} "
            f"| {r['neurons'] or '–'} |"
        )
    lines += ["", "Refused, as no layer has a name that fits: " + ", ".join(refused) + "."]
    lines += ["", "## Units that stay", "", "| family | which, and why |", "|---|---|"]
    lines += [f"| {r['family']} | {r['units_stay']} |" for r in grouped if r["units_stay"]]
    lines += [""]
    return "\n".join(lines)


def main() -> None:
    table = list(rows())
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    PAGE.write_text(page(table))


if __name__ == "__main__":
    main()
