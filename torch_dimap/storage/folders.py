"""Folders of models as the Hugging Face hub lays them out: weights beside their config.json."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INDEX = ".index.json"  # what the name of a list of shards ends in
WEIGHTS = "model.safetensors"
# Where transformers, timm and diffusers put the weights; the first that is there is taken.
_PLACES = (
    WEIGHTS,
    f"{WEIGHTS}{INDEX}",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
# The same weights in other forms, a training's state, and what tools leave behind.
_LEFT_OUT = ("*.safetensors", "*.bin", f"*{INDEX}", "*.pt", "*.pth", "*.h5", "*.msgpack",
             "*.onnx", "*.ckpt", "*.tflite", "flax_*", "tf_*", ".git", ".cache")  # fmt: skip


def weights_in(folder: Path) -> Path:
    """Return the file with a folder's weights.

    Raises:
        ValueError: if there is none.
    """
    for name in _PLACES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"{folder} must be a checkpoint, found a folder without {', '.join(_PLACES[:2])} or "
        f"{_PLACES[3]}: name a file in it."
    )


@contextmanager
def copied_folder(source: Path, target: Path, caller: str) -> Iterator[Path]:
    """Yield where to write the weights of a folder's copy, which appears when it is whole.

    Args:
        source: a folder as ``weights_in`` takes it. All in it but weights is copied.
        target: the new folder.
        caller: the function's name for messages.

    Raises:
        ValueError: if the target is inside the source, or a file.
        OSError: if it exists and is not empty, or the disk refuses.
    """
    source, target = source.resolve(), Path(os.path.realpath(target))
    if source == target or source in target.parents:
        raise ValueError(f"{caller}: the target must lie outside of {source}, found {target}.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{caller}: {target} must be a new or an empty folder, since a folder is not replaced: "
            "name another, or remove it first."
        )
    part = target.with_name(f".{target.name}.torch_dimap-part")
    shutil.rmtree(part, ignore_errors=True)  # what a kill has left
    try:
        shutil.copytree(source, part, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        yield part / WEIGHTS
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
