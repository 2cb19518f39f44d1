"""Make the links of a Markdown file absolute, as a package index needs them.

    python .github/absolute_links.py README.md https://github.com/OWNER/NAME

The release workflow calls it with the address that it runs at, so that no file has to know it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def absolute(markdown: str, repository: str) -> str:
    """Return the text with links to files of the repository written out."""

    def write_out(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({repository}/{kind}/main/{match[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)", write_out, markdown)


if __name__ == "__main__":
    file, repository = Path(sys.argv[1]), sys.argv[2].rstrip("/")
    file.write_text(absolute(file.read_text(encoding="utf-8"), repository), encoding="utf-8")
