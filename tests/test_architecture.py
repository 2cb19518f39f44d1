"""The README's picture of the house is the house."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_files_import_only_from_the_rows_above_their_own():
    _, _, section = (ROOT / "README.md").read_text().partition("## Architecture")
    rows = [re.findall(r"`(\w+)`", line.split("|")[1])
            for line in section.splitlines() if line.startswith("| `")]  # fmt: skip
    floor = {name: i for i, row in enumerate(rows) for name in row}
    files = {path.stem: path for path in (ROOT / "torch_dimap").glob("*.py")}
    del files["__init__"]
    assert sorted(floor) == sorted(files)
    upward = [
        f"{name} imports {other}"
        for name, path in files.items()
        for other in re.findall(r"^ *from torch_dimap\.(\w+) import", path.read_text(), re.M)
        if floor[other] > floor[name]
    ]
    assert not upward
