"""The command line, ``torch-dimap``."""

from torch_dimap.command.parser import main

__all__ = [
    "main",
]
