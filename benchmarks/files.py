"""Time, size and memory of sparse files, beside whole ones.

  model  a Swin pruned by half: save_pruned and load_pruned beside safetensors' own save_file
         and load_file on the dense model. Saving includes the wait for the disk (fsync),
         which save_file leaves out. load_file maps the file and reads nothing; so loading is
         set beside load_file with backend="pread", which reads it, and, into a model, beside
         load_state_dict of a mapped file.
  file   a checkpoint of --gigabytes, pruned by half without its model, beside a plain copy of
         it (read and write in pieces of 1 MB, then fsync); peak memory is all of the
         process, torch's libraries included (VmHWM).

Every run is timed in a fresh process, all kinds in turn, round by round. Writes files.csv
(every run) and files.md (medians and ratios) to --output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from prune import SWINS, provenance, write_csv
from torch import nn
from tqdm import tqdm

import torch_dimap

AMOUNT = 0.5
WIDTH = 1024  # of the blocks that the large file is made of


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def build(model: str, seed: int) -> nn.Module:
    import timm

    torch.manual_seed(seed)
    return timm.create_model(model)


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_model(model: str, folder: Path, seed: int) -> list[dict]:
    """Save and load a pruned model and its dense twin, each once to warm up."""
    import safetensors.torch

    network = build(model, seed)
    dense = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fresh = build(model, seed + 1)
    torch_dimap.global_module_aware_unstructured(
        torch_dimap.group_parameters(network), amount=AMOUNT
    )
    whole, packed, masks = (folder / f"{name}.safetensors" for name in ("whole", "packed", "masks"))
    actions: dict[str, Callable[[], object]] = {
        "save_file": lambda: safetensors.torch.save_file(dense, whole),
        "save_pruned": lambda: torch_dimap.save_pruned(network, packed, force=True),
        "save_pruned, masks": lambda: torch_dimap.save_pruned(
            network, masks, masks_only=True, force=True
        ),
        "load_file, mapped": lambda: safetensors.torch.load_file(whole),
        "load_file, read": lambda: safetensors.torch.load_file(whole, backend="pread"),
        "load_pruned": lambda: torch_dimap.load_pruned(packed),
        "load_file, into model": lambda: fresh.load_state_dict(safetensors.torch.load_file(whole)),
        "load_pruned, into model": lambda: torch_dimap.load_pruned(fresh, packed),
    }
    sizes = {"save_file": whole, "save_pruned": packed, "save_pruned, masks": masks}
    rows = []
    for kind, action in actions.items():
        action()
        seconds = timed(action)
        size = sizes[kind].stat().st_size if kind in sizes else ""
        rows.append({"what": model, "kind": kind, "seconds": seconds, "bytes": size})
    return rows


def make_file(path: Path, gigabytes: float, seed: int) -> None:
    """Write the blocks of a plain vision transformer, random."""
    import safetensors.torch

    generator = torch.Generator().manual_seed(seed)
    shapes = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    dtype = torch.bfloat16 if ".bfloat16" in path.suffixes else torch.float32
    blocks = max(1, round(gigabytes * 1e9 / (12 * WIDTH**2 * dtype.itemsize)))
    state = {
        f"blocks.{i}.{name}.weight": (0.01 * (1 + i % 7) * torch.randn(
            rows * WIDTH, columns * WIDTH, generator=generator
        )).to(dtype)
        for i in range(blocks)
        for name, (rows, columns) in shapes.items()
    }  # fmt: skip
    torch.save(state, path) if path.suffix == ".pth" else safetensors.torch.save_file(state, path)


def copy(source: Path, target: Path) -> None:
    with open(source, "rb") as old, open(target, "wb") as new:
        while piece := old.read(1 << 20):
            new.write(piece)
        new.flush()
        os.fsync(new.fileno())


FORMATS = ["safetensors", "pth", "bfloat16.safetensors"]
FILE_KINDS: dict[str, Callable[[Path, Path], object]] = {
    "copy": copy,
    "prune_checkpoint": lambda source, target: torch_dimap.prune_checkpoint(source, target, AMOUNT),
    "prune_checkpoint, compressed": lambda source, target: torch_dimap.prune_checkpoint(
        source, target, AMOUNT, compressed=True
    ),
}


def measure_file(kind: str, source: Path) -> list[dict]:
    target = source.with_name("target.safetensors")
    imported = peak_bytes()
    try:
        seconds = timed(lambda: FILE_KINDS[kind](source, target))
        size = target.stat().st_size
    finally:
        target.unlink(missing_ok=True)
    return [{"what": source.name, "kind": kind, "seconds": seconds, "bytes": size,
             "peak_bytes": peak_bytes(), "imported_bytes": imported}]  # fmt: skip


def in_fresh_process(*job: object) -> list[dict]:
    command = [sys.executable, __file__, "--one", json.dumps(list(map(str, job)))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"benchmark: {' '.join(map(str, job))} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_one(job: list[str]) -> list[dict]:
    if job[0] == "model":
        return measure_model(job[1], Path(job[2]), int(job[3]))
    if job[0] == "make":
        make_file(Path(job[1]), float(job[2]), int(job[3]))
        return []
    return measure_file(job[1], Path(job[2]))


# What each kind is set beside: the same done to whole tensors.
BESIDE = {
    "save_pruned": "save_file",
    "save_pruned, masks": "save_file",
    "load_pruned": "load_file, read",
    "load_pruned, into model": "load_file, into model",
    "prune_checkpoint": "copy",
    "prune_checkpoint, compressed": "copy",
}


def markdown(rows: list[dict]) -> str:
    """Lay out medians over the rounds, with the medians of the ratios within a round."""
    first = rows[0]
    lines = [
        f"Medians of {first['rounds']} rounds on {first['machine']}, torch {first['torch']}, seed "
        f"{first['seed']}, commit {first['commit']}. Command: `{first['command']}`.",
        "",
        "| what | kind | seconds | ÷ whole | MB | ÷ whole | peak memory, MB | of it imports |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for what, kind in dict.fromkeys((row["what"], row["kind"]) for row in rows):
        own = [row for row in rows if (row["what"], row["kind"]) == (what, kind)]
        whole = [row for row in rows if (row["what"], row["kind"]) == (what, BESIDE.get(kind))]
        middle = statistics.median
        cells = [what, kind, f"{middle(row['seconds'] for row in own):.3f}"]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(own, whole)]
        cells.append(f"{middle(ratios):.2f}" if ratios else "")
        cells.append(f"{own[0]['bytes'] / 1e6:,.1f}" if own[0]["bytes"] else "")
        sized = whole and own[0]["bytes"]
        cells.append(f"{own[0]['bytes'] / whole[0]['bytes']:.1%}" if sized else "")
        for key in ("peak_bytes", "imported_bytes"):
            cells.append(f"{max(row[key] for row in own) / 1e6:,.0f}" if own[0].get(key) else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="Swin-B", metavar="MODEL",
        help=f"of {', '.join(SWINS)}, or any timm name (default: Swin-B)")  # fmt: skip
    add("--gigabytes", type=float, default=2.0, help="size of the large file (default: 2)")
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS,
        help="of the large file; float32, but for the last (default: all)")  # fmt: skip
    add("--repeats", type=int, default=5, help="rounds (default: 5)")
    add("--seed", type=int, default=0, help="of the random weights (default: 0)")
    add("--folder", type=Path, metavar="DIR",
        help="where to put the files meanwhile (default: that of temporary files)")  # fmt: skip
    add("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR",
        help="(default: benchmarks/results)")  # fmt: skip
    add("--one", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.one:
        print(json.dumps(run_one(json.loads(options.one))))
        return
    model = SWINS.get(options.model, options.model)
    about = {"seed": options.seed, "rounds": options.repeats, **provenance("cpu")}
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        sources = [folder / f"large.{kind}" for kind in options.formats]
        for source in sources:
            in_fresh_process("make", source, options.gigabytes, options.seed)
        jobs = [("model", model, folder, options.seed)]
        jobs += [("file", kind, source) for source in sources for kind in FILE_KINDS]
        for round_ in tqdm(range(options.repeats), desc="rounds"):
            for job in tqdm(jobs, desc="measurements", leave=False):
                for row in in_fresh_process(*job):
                    rows.append({"round": round_, **row, **about})
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "files.csv", "w", newline="") as file:
        write_csv(rows, file)
    text = markdown(rows)
    (options.output / "files.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
