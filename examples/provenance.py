"""Figures as CSV, and where they come from: command, machine, versions and commit."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import timm
import torch


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if "model name" in x), cpu)
    return f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def commit() -> str:
    """Return this checkout's commit, with a + if it holds changes; empty outside of git."""
    command = ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # no git
        return ""
    return done.stdout.strip()


def provenance(device: str) -> dict[str, str]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_name(device),
        "torch": str(torch.__version__),  # a class of its own, which weights_only refuses
        "timm": timm.__version__,
        "commit": commit(),
    }


def write_csv(rows: Sequence[Mapping[str, Any]], file: TextIO) -> None:
    """Write rows under the names of all their fields."""
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
