"""Scripts and functions run in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

import torch
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


def start(
    script: str, *arguments: object, stdout: Path, stderr: Path, **environment: object
) -> multiprocessing.process.BaseProcess:
    """Start a script of this repository, which prints to files."""
    words = [str(ROOT / script), *map(str, arguments)]
    variables = {name: str(value) for name, value in environment.items()}
    process = multiprocessing.get_context("forkserver").Process(
        target=_main, args=(words, [stdout, stderr], os.getcwd(), variables)
    )
    process.start()
    return process


def run(script: str, *arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
    """Run a script of this repository; return what it prints, and its exit status.

    Several processes find each other as those of torchrun do; what they print is joined.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = {name: Path(folder, name) for name in ("stdout", "stderr")}
        started = [
            start(script, *arguments, **streams, **environment)
            for environment in (as_torchrun(processes) if processes > 1 else [{}])
        ]
        while alive := [process for process in started if process.is_alive()]:
            if any(process.exitcode for process in started):  # the others might wait for it
                for process in alive:
                    process.terminate()
            connection.wait([process.sentinel for process in alive])
        printed = [stream.read_text() for stream in streams.values()]
    status = next((process.exitcode for process in started if process.exitcode), 0)
    return subprocess.CompletedProcess([script, *arguments], status, *printed)


def as_torchrun(processes: int) -> list[dict[str, object]]:
    """Return for each process what torchrun puts into its environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": processes}
    return [{**meeting, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]


def _main(words: list[str], streams: list[Path], folder: str, variables: dict[str, str]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by tests in the background
    os.chdir(folder)
    os.environ.update(variables, PYTHONPATH=str(ROOT))
    if "RANK" in variables:
        torch.set_num_threads(1)  # processes side by side share the cores
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")
