"""What the site needs beyond the pages: the README as its start, and links that lead on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")
_ROLE = re.compile(r":(?:func|class|data|meth|mod|attr):<code>~?(?:torch_dimap\.)?([^<]*)</code>")


def on_files(files: Any, config: Any) -> Any:
    """Make the README the first page, and bring the pictures that pages show."""
    start = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=start))
    for picture in [*ROOT.glob("examples/results/*.png"), *ROOT.glob("benchmarks/results/*.png")]:
        path = f"{picture.relative_to(ROOT)}"
        files.append(File.generated(config, path, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links out of the pages lead to the repository, or drop them if nobody tells where."""

    def lead(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path = target.removeprefix("../")
        if picture:
            return f"![{text}]({path})"
        if path == target and (ROOT / "docs" / path.partition("#")[0]).exists():
            return match[0]
        return f"[{text}]({_repository()}/blob/main/{path})" if _repository() else text

    return _LINK.sub(lead, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Write what docstrings have as roles of Sphinx as code."""
    return _ROLE.sub(r"<code>\1</code>", html)


def _repository() -> str:
    """Return the address that continuous integration tells."""
    name = os.environ.get("GITHUB_REPOSITORY")
    return f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{name}" if name else ""
