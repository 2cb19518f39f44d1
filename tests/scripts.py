"""Scripts and functions run in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing

ROOT = Path(__file__).parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before that is imported
# Each is forked from a process that has imported this and done nothing else: seconds less.
multiprocessing.set_forkserver_preload(["timm", "torch_dimap", "torch.distributed.fsdp"])


def in_forks(function: Callable[..., None], processes: int, *arguments: object) -> None:
    """Call ``function(rank, *arguments)`` in each process; what fails in one fails here."""
    torch.multiprocessing.start_processes(
        function, arguments, processes, start_method="forkserver"
    )


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script of this repository; return what it prints, and its exit status."""
    words = [str(ROOT / script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("forkserver").Process(
            target=_main, args=(words, streams, os.getcwd())
        )
        process.start()
        process.join()
        printed = [stream.read_text() for stream in streams]
    return subprocess.CompletedProcess(words, process.exitcode, *printed)


def _main(words: list[str], streams: list[Path], folder: str) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(ROOT)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")
