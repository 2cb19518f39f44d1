"""Time and memory of reconstruct(): random weights and images serve for both.

Prunes a model by half and refits it on random images, in a process of its own for each
measurement. Memory is the peak during the call above what was held before it, which is the
model and the images.

    python benchmarks/reconstruct.py --models Swin-T --images 128
    python benchmarks/reconstruct.py --solvers      the solvers on a layer's own statistics

Writes reconstruct.csv to --output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from prune import AMOUNT, SWINS, PeakMemory, provenance, write_csv

import torch_dimap
from torch_dimap.reconstruction import solve_exactly, solve_masked

MODELS = {name: SWINS[name] for name in ("Swin-T", "Swin-B", "Swin-L")}


def measure(name: str, images: int, batch: int, sequential: bool, device: str) -> dict:
    """Reconstruct one model; return seconds and MB."""
    torch.manual_seed(0)
    model = timm.create_model(MODELS[name]).to(device)
    groups = torch_dimap.group_parameters(model)
    torch_dimap.global_module_aware_unstructured(groups, amount=AMOUNT)
    batches = torch.randn(images, 3, 224, 224).split(batch)
    with torch.no_grad():
        model(batches[0].to(device)[:1])
    start = time.perf_counter()
    with PeakMemory(device) as memory:
        misfits = torch_dimap.reconstruct(model, batches, sequential=sequential)
    seconds = time.perf_counter() - start
    gains = [misfit.after / misfit.before for misfit in misfits.values() if misfit.before]
    return {
        "model": name, "images": images, "batch": batch, "seconds": round(seconds, 1),
        "how": "in order" if sequential else "each for itself",
        "processor_seconds": round(time.process_time(), 1), "extra_mb": round(memory.extra / 1e6),
        "left_of_the_misfit": round(sum(gains) / len(gains), 3),
    }  # fmt: skip


def column_order(moments, gradient, keep, ridge) -> torch.Tensor:
    """Refit as SparseGPT does, column after column, for the masks and targets at hand.

    What pruning took from a column is made up for by the columns after it, through the
    Cholesky factor of the inverse that all rows share. The targets here are errors; their
    least-squares answer over all columns is where the columns start from.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments + torch.diag(ridge)))
    upper = torch.linalg.cholesky(inverse, upper=True)
    change = gradient @ inverse
    for i in range(len(upper)):
        lost = torch.where(keep[:, i], 0.0, change[:, i]) / upper[i, i]
        change[:, i:] -= lost[:, None] * upper[i, i:]
    return torch.where(keep, change, 0.0)


def compare_solvers(columns: int, rows: int, tokens: int, density: float) -> list[dict]:
    """Solve one problem with correlated inputs in three ways; return seconds and errors."""
    torch.manual_seed(0)
    mixing = torch.randn(columns, columns, dtype=torch.float64)
    scales = torch.logspace(0, -2, columns, dtype=torch.float64)
    x = torch.randn(tokens, columns, dtype=torch.float64) * scales @ mixing + 1
    weight = torch.randn(rows, columns, dtype=torch.float64)
    keep = torch.rand(rows, columns) < density
    error = x @ (weight * ~keep).t()
    moments, gradient = x.t() @ x, error.t() @ x
    ridge = (0.01 * moments.diagonal().mean()).expand(columns)
    total = float(error.square().sum())
    found = []
    for name, solve in (
        ("exact", lambda: solve_exactly(moments, gradient, keep, ridge)),
        ("conjugate gradients", lambda: solve_masked(moments, gradient, keep, ridge, total)),
        ("column order", lambda: column_order(moments, gradient, keep, ridge)),
    ):
        start = time.perf_counter()
        change = solve()
        seconds = time.perf_counter() - start
        left = total - float((change * (2 * gradient - change @ moments)).sum())
        left += float((ridge * change**2).sum())
        found.append({"solver": name, "columns": columns, "rows": rows, "density": density,
                      "seconds": round(seconds, 2), "left": left / total})  # fmt: skip
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    add("--images", type=int, default=128, help="(default: 128)")
    add("--batch-size", type=int, default=16, help="(default: 16)")
    add("--itself", action="store_true", help="each layer for itself instead of in order")
    add("--solvers", action="store_true", help="compare solvers on one layer instead")
    add("--columns", type=int, default=512, help="of the layer for --solvers (default: 512)")
    add("--rows", type=int, default=256, help="of the layer for --solvers (default: 256)")
    add("--density", type=float, default=0.5, help="of its mask (default: 0.5)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    add("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR",
        help="(default: benchmarks/results)")  # fmt: skip
    add("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    if options.solvers:
        rows = compare_solvers(options.columns, options.rows, 4 * options.columns, options.density)
    else:
        rows = []
        for name in options.models:
            case = [name, options.images, options.batch_size, not options.itself, options.device]
            command = [sys.executable, __file__, "--one", json.dumps(case)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    rows = [{**row, **provenance(options.device)} for row in rows]
    for row in rows:
        print(row)
    options.output.mkdir(parents=True, exist_ok=True)
    name = "reconstruct-solvers.csv" if options.solvers else "reconstruct.csv"
    with open(options.output / name, "w", newline="") as file:
        write_csv(rows, file)


if __name__ == "__main__":
    main()
