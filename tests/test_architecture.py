"""The README's picture of the house is the house."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "torch_dimap"
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def imports_of(path: Path) -> list[list[str]]:
    """Return the folder and, where it tells one, the file of every import from the package."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = getattr(node, "names", [])
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}".split(".") for alias in names]
        elif isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in names]
    return [
        [folder] if not rest or not (PACKAGE / folder / f"{rest[0]}.py").is_file() else
        [folder, rest[0]]
        for package, folder, *rest in (parts for parts in found if len(parts) > 1)
        if package == "torch_dimap" and folder in [*FOLDERS, "text"]
    ]  # fmt: skip


def floors() -> list[list[str]]:
    """Return the folders that each row of the README's table names, lowest floor first."""
    _, _, section = (ROOT / "README.md").read_text().partition("## Architecture")
    section = section.partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")]
    found: dict[int, list[str]] = {}
    for number, names in rows:
        if number.strip().isdigit():
            found.setdefault(int(number), []).extend(re.findall(r"`(\w+)/`", names))
    return [found[number] for number in sorted(found)]


def test_the_table_names_every_folder_once():
    assert sorted(name for names in floors() for name in names) == FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_from_lower_floors_only(folder):
    height = {name: i for i, names in enumerate(floors()) for name in names}
    upward = [
        f"{path.name} imports {other[0]}"
        for path in (PACKAGE / folder).glob("*.py")
        for other in imports_of(path)
        if other[0] not in (folder, "text") and height[other[0]] >= height[folder]
    ]
    assert not upward


@pytest.mark.parametrize("folder", FOLDERS)
def test_other_folders_are_entered_by_the_door(folder):
    inside = [
        f"{path.name} imports {'.'.join(other)}"
        for path in (PACKAGE / folder).glob("*.py")
        for other in imports_of(path)
        if other[0] != folder and len(other) > 1
    ]
    assert not inside


@pytest.mark.parametrize("folder", FOLDERS)
def test_inside_a_folder_there_is_no_circle(folder):
    graph = {
        path.stem: {other[1] for other in imports_of(path) if other[0] == folder and len(other) > 1}
        for path in (PACKAGE / folder).glob("*.py")
        if path.stem != "__init__"
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("folder", ["examples", "benchmarks", "docs"])
def test_scripts_import_nothing_from_inside_a_folder(folder):
    inside = [
        f"{path.name} imports {'.'.join(other)}"
        for path in (ROOT / folder).glob("*.py")
        for other in imports_of(path)
        if len(other) > 1
    ]
    assert not inside
