"""The pages lead where they say, name all there is, and make a site."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_dimap

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return what links to headings of a page end in, as GitHub and the site have it."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_and_to_files_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        if link.startswith("http"):
            continue
        target = page if not path else page.parent / path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs/api.md").read_text()
    for place, names in (("", torch_dimap.__all__), (r"learning\.", torch_dimap.learning.__all__)):
        listed = re.findall(rf"^::: torch_dimap\.{place}(\w+)$", text, re.M)
        assert len(listed) == len(set(listed))
        assert set(listed) == set(names) - {"__version__", "learning"}


def test_absolute_links_leave_no_relative_one():
    path = ROOT / ".github" / "absolute_links.py"
    spec = importlib.util.spec_from_file_location("absolute_links", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.absolute((ROOT / "README.md").read_text(), "https://github.com/a/b")
    assert all(link.startswith(("https://", "#")) for link in LINK.findall(text))
    assert "https://github.com/a/b/raw/main/examples/results/one_shot.png" in text
    assert "https://github.com/a/b/blob/main/docs/units.md" in text


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("material", "mkdocstrings")),
    reason="needs mkdocs-material and mkdocstrings",
)
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api" / "index.html").read_text()
    assert 'id="torch_dimap.prune_like"' in reference and ":func:" not in reference
