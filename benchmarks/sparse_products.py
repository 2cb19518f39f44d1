"""When are zeros faster? The products of ViT-B's layers, dense and with weights in CSR.

Every layer of one block multiplies the tokens of one image, 197 of them, by a float32
weight with so many zeros at random places: dense as it is, and in torch's sparse format.
Dense and sparse take turns, and medians and quartiles of the turns are told.

    python benchmarks/sparse_products.py --sparsity 0.5 0.8 0.9 0.95
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch

# Layer -> rows (outputs) and columns (inputs) of its weight.
LAYERS = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
TOKENS = 197


def seconds(weights: list[torch.Tensor], inputs: list[torch.Tensor]) -> float:
    """Return how long the products of one block take."""
    start = time.perf_counter()
    for weight, x in zip(weights, inputs):
        weight @ x
    return time.perf_counter() - start


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="images at a time")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.repeats} turns")
    print("| zeros | images | dense, ms (quartiles) | CSR, ms (quartiles) | dense / CSR |")
    print("|---:|---:|---:|---:|---:|")
    for batch in arguments.batch:
        inputs = [torch.randn(columns, batch * TOKENS) for _, columns in LAYERS.values()]
        for sparsity in arguments.sparsity:
            dense = [torch.randn(*s) * (torch.rand(s) >= sparsity) for s in LAYERS.values()]
            turns = {"dense": dense, "CSR": [weight.to_sparse_csr() for weight in dense]}
            times: dict[str, list[float]] = {way: [] for way in turns}
            for turn in range(arguments.repeats + 3):
                for way, weights in turns.items():
                    taken = seconds(weights, inputs)
                    if turn >= 3:  # to warm up
                        times[way].append(1000 * taken)
            medians = {way: statistics.median(taken) for way, taken in times.items()}
            cells = []
            for way, taken in times.items():
                low, _, high = statistics.quantiles(taken, n=4)
                cells.append(f"{medians[way]:.2f} ({low:.2f}–{high:.2f})")
            ratio = medians["dense"] / medians["CSR"]
            print(f"| {sparsity:.0%} | {batch} | {' | '.join(cells)} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
