"""A run's folder: new, or one to go on in with the state that it holds."""

from __future__ import annotations

import argparse
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from models import fail


def claim_new(folder: Path) -> None:
    """End the script if a folder holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} is not an empty folder: choose another, or --resume.")


def read_state(path: Path, options: argparse.Namespace, free: Container[str]) -> dict[str, Any]:
    """Return the state in a file of this script, made with the same options.

    Args:
        path: the file.
        options: those of now.
        free: names of options that may differ: where it runs, not what it computes.
    """
    if not path.is_file():
        fail(f"--resume: there is no file {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["options"]
    except Exception as error:  # a damaged or a foreign file raises many kinds
        fail(f"--resume: {path} must be written by this script: {str(error).splitlines()[0]}")
    now = kept_options(options, free)
    changed = [f"--{key.replace('_', '-')}" for key in now if now[key] != before.get(key)]
    if changed:
        fail(f"--resume: {path} was made with other values of {', '.join(sorted(changed))}.")
    return state


def kept_options(options: argparse.Namespace, free: Container[str]) -> dict[str, Any]:
    """Return the options that a file is made with, as it holds them."""
    values = {key: value for key, value in vars(options).items() if key not in free}
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
