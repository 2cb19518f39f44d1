"""Docstrings as the site shows them: doctests set as code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Give the sections of doctests the name by which griffe knows them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one docstring, as it is read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)
