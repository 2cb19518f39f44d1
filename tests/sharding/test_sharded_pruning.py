"""Masks of sharded models, next to those of the same models unsharded."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.distributed as dist
from processes import WAYS, in_processes, random_model, whole

from torch_dimap import global_module_aware_unstructured, remove_all


def pairs_of(model, seed):
    """Put the layers of a model into groups."""
    rng = random.Random(seed)
    groups = {}
    for layer in model.layers:
        groups.setdefault(rng.choice("ab"), []).append((layer, "weight"))
    return groups


def compare(cases, ways):
    for seed in cases:
        rng = random.Random(seed)
        dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
        way = rng.choice(ways)
        # Of both ways at once, torch itself cannot join parts where one of them is empty.
        alone = random_model(seed, dtype, even=way == "both")
        sharded = WAYS[way](copy.deepcopy(alone), rng)
        here = (seed % dist.get_world_size()) == dist.get_rank()  # one process compares
        names = "weight_mask", "weight_orig", "weight"
        for _ in range(3):
            amount = rng.choice([0.0, rng.random() / 2, rng.random()])
            threshold = global_module_aware_unstructured(pairs_of(sharded, seed), amount=amount)
            told = [{}] * dist.get_world_size()
            dist.all_gather_object(told, threshold)
            assert told == [threshold] * len(told), (seed, told)
            found = [[whole(getattr(x, name)) for name in names] for x in sharded.layers]
            if here:
                expected = global_module_aware_unstructured(pairs_of(alone, seed), amount=amount)
                assert threshold == expected, seed
                for i, (layer, tensors) in enumerate(zip(alone.layers, found)):
                    for name, tensor in zip(names, tensors):
                        assert torch.equal(getattr(layer, name), tensor), (seed, i, name)
        remove_all(sharded)
        found = [whole(layer.weight) for layer in sharded.layers]
        for layer in sharded.layers:
            assert list(layer.state_dict()) == ["weight", "bias"]
        if here:
            remove_all(alone)
            assert all(torch.equal(x.weight, tensor) for x, tensor in zip(alone.layers, found))


@pytest.mark.filterwarnings("ignore:.*have lost all")
@pytest.mark.parametrize(
    ("processes", "ways"),
    [(1, ["fully_shard", "plan"]), (2, ["fully_shard", "plan"]), (4, list(WAYS))],
)
def test_masks_and_thresholds_are_those_of_the_unsharded_model(processes, ways, tmp_path):
    in_processes(processes, tmp_path, compare, range(10 * processes, 20 * processes), ways)
