"""Build a timm model with the weights that the command line asks for, and save it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NoReturn

import safetensors.torch
import timm
from timm.utils import ParseKwargs
from torch import Tensor, nn


def fail(message: str) -> NoReturn:
    """End the script with one line on the standard error, under its own name."""
    sys.exit(f"{Path(sys.argv[0]).stem}: {message}")


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="timm's weights, downloaded")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights on disk")
    weights.add_argument("--random-init", action="store_true", help="random weights")


def add_model_kwargs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE",
        help="for timm.create_model, such as img_size=32 window_size=4 'depths=(2,2,6)'",
    )  # fmt: skip


def load_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    **kwargs: object,
) -> nn.Module:
    """Return the timm model ``name``, or end the script and say why that is not possible."""
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        hint = f"; there are {', '.join(close)}." if close else "."
        fail(f"timm knows no model {name!r}{hint}")
    if checkpoint and not checkpoint.is_file():
        fail(f"there is no file {checkpoint}.")
    source = f"weights of {checkpoint}" if checkpoint else "weights"
    try:
        return timm.create_model(
            name, pretrained=pretrained, checkpoint_path=str(checkpoint or ""), **kwargs
        )
    except Exception as error:  # timm, the hub and torch raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        fail(
            f"no {source} for {name}: {reason[:300]}{'...' if len(reason) > 300 else ''}\n"
            "Give a file that fits with --checkpoint, or --random-init for random weights."
        )


@contextlib.contextmanager
def whole_or_not_at_all(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes the place of ``path`` once all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, mode, newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes the latter of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_model(model: nn.Module, path: Path) -> None:
    """Write a model's state dict as safetensors."""
    save_weights(model.state_dict(), path)


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors."""
    state = {key: value.contiguous() for key, value in state.items()}
    with whole_or_not_at_all(path) as file:
        file.write(safetensors.torch.save(state))
