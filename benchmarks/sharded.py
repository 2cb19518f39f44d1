"""Pruning a sharded model: time, bytes sent and memory of each process, by their number.

Layers of random weights are spread by fully_shard over 1, 2, 4 and 8 processes with gloo, which
share the cores of this machine, and pruned in one call. Beside it stand the call on the same
layers in one process that has all cores, and prune.identity on layers of the size of a shard, in
as many processes at once.

A process sends its part of an all_gather to every other one, and of an all_reduce twice the
vector but for its own part, as rings do. Memory is the peak above what was held before.

Writes sharded.csv (every run) and sharded.md (medians and ratios) to --output.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from prune import PeakMemory
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from tqdm import tqdm

import torch_dimap

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from provenance import provenance, write_csv  # noqa: E402

AMOUNT = 0.5
COLUMNS = 1000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
METHODS = ("sharded", "unsharded", "identity")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N",
        help="(default: 1 2 4 8)")
    add("--layers", type=int, nargs="+", default=[24], metavar="N", help="(default: 24)")
    add("--sizes", type=float, nargs="+", default=[1e6, 4e6], metavar="N",
        help="weights of a layer (default: 1e6 4e6)")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: both)")
    add("--repeats", type=int, default=3, help="runs of each (default: 3)")
    add("--seed", type=int, default=0, help="of the random weights (default: 0)")
    add("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR",
        help="(default: benchmarks/results)")
    return parser.parse_args()


def build(layers: int, rows: int, dtype: torch.dtype, seed: int) -> nn.Sequential:
    """Return layers of different scales, alike in every process."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(COLUMNS, rows, bias=False, dtype=dtype)
                            for _ in range(layers)))  # fmt: skip
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.normal_(generator=generator).mul_(0.01 * (1 + i % 7))
    return model


class Sent:
    """Bytes that this process sends in the collectives of a block."""

    def __enter__(self) -> Sent:
        self.bytes, self.calls = 0.0, 0
        self.kept = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
        dist.all_reduce = self._counting("all_reduce")
        dist.all_gather = self._counting("all_gather")
        return self

    def _counting(self, name: str):
        def call(first, second=None, **kwargs):
            world = dist.get_world_size()
            own = first.nbytes if name == "all_reduce" else second.nbytes
            self.bytes += own * (2 * (world - 1) / world if name == "all_reduce" else world - 1)
            self.calls += 1
            arguments = (first,) if second is None else (first, second)
            return self.kept[name](*arguments, **kwargs)

        return call

    def __exit__(self, *exception: object) -> None:
        for name, function in self.kept.items():
            setattr(dist, name, function)


def call(method: str, model: nn.Module) -> None:
    if method == "identity":
        for layer in model:
            prune.identity(layer, "weight")
    else:
        groups = {"all": [(layer, "weight") for layer in model]}
        torch_dimap.global_module_aware_unstructured(groups, amount=AMOUNT)


def work(rank: int, processes: int, threads: int, job: dict, folder: str) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    rows, dtype = int(job["size"]) // COLUMNS, DTYPES[job["dtype"]]
    if job["method"] == "identity":
        rows = -(-rows // processes)
    small, model = (build(*shape, dtype, job["seed"]) for shape in ((2, 64), (job["layers"], rows)))
    if job["method"] == "sharded":
        mesh = init_device_mesh("cpu", (processes,))
        small, model = (fully_shard(x, mesh=mesh) for x in (small, model))
    call(job["method"], small)  # loads libraries, starts threads
    dist.barrier()
    with PeakMemory("cpu") as memory, Sent() as sent:
        start = time.perf_counter()
        call(job["method"], model)
        seconds = time.perf_counter() - start
    found = torch.tensor([seconds, memory.extra, sent.bytes, sent.calls], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def measure(job: dict) -> dict:
    """Prune once, in fresh processes; return the worst of them in each figure."""
    processes = job["processes"] if job["method"] != "unsharded" else 1
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (processes, threads, job, folder), processes)
        seconds, extra, sent, calls = torch.load(f"{folder}/found.pt").tolist()
    shard = job["layers"] * job["size"] * DTYPES[job["dtype"]].itemsize / processes
    return {**job, "threads": threads, "seconds": seconds, "extra_bytes": int(extra),
            "sent_bytes": int(sent), "calls": int(calls), "shard_bytes": int(shard)}  # fmt: skip


def markdown(rows: list[dict]) -> str:
    """Lay the medians out as a table."""
    medians: dict[tuple, dict] = {}
    for row in rows:
        key = row["dtype"], row["size"], row["layers"], row["processes"], row["method"]
        runs = [x for x in rows if all(x[k] == row[k] for k in (
            "dtype", "size", "layers", "processes", "method"))]  # fmt: skip
        medians[key] = {k: statistics.median(x[k] for x in runs)
                        for k in ("seconds", "extra_bytes", "sent_bytes", "calls", "shard_bytes")}
    lines = [
        f"Medians of {len(rows) // max(1, len(medians))} runs on {rows[0]['machine']}, torch "
        f"{rows[0]['torch']}, seed {rows[0]['seed']}, commit {rows[0]['commit']}. Command: "
        f"`{rows[0]['command']}`.",
        "",
        "| weights | processes | seconds | ÷ unsharded | collectives | sent, KB | ÷ shard "
        "| extra memory, MB | ÷ identity |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (dtype, size, layers, processes, method), own in medians.items():
        if method == "sharded":
            alone, floor = (medians[dtype, size, layers, n, name]
                            for n, name in ((1, "unsharded"), (processes, "identity")))
            lines.append(
                f"| {layers} x {size:.0e} {dtype} | {processes} | {own['seconds']:.3f} "
                f"| {own['seconds'] / alone['seconds']:.2f} | {own['calls']:.0f} "
                f"| {own['sent_bytes'] / 1e3:.0f} "
                f"| {own['sent_bytes'] / own['shard_bytes']:.2%} "
                f"| {own['extra_bytes'] / 1e6:.0f} "
                f"| {own['extra_bytes'] / floor['extra_bytes']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    options = parse()
    jobs = [
        {"method": method, "processes": n, "layers": layers, "size": size, "dtype": dtype,
         "seed": options.seed}
        for dtype in options.dtypes for size in options.sizes for layers in options.layers
        for n in options.processes for method in METHODS
        if method != "unsharded" or n == options.processes[0]
    ]  # fmt: skip
    for job in jobs:
        if job["method"] == "unsharded":
            job["processes"] = 1
    origin = provenance("cpu")
    # Round by round, so that a slow spell of the machine touches all alike.
    rows = [{**measure(job), "amount": AMOUNT, **origin}
            for _ in tqdm(range(options.repeats), desc="rounds")
            for job in tqdm(jobs, desc="measurements", leave=False)]  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "sharded.csv", "w", newline="") as file:
        write_csv(rows, file)
    table = markdown(rows)
    (options.output / "sharded.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
