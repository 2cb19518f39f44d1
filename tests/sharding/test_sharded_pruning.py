"""Masks of sharded models, next to those of the same models unsharded."""

from __future__ import annotations

import copy
import random

import pytest
import torch
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
        for _ in range(3):
            amount = rng.choice([0.0, rng.random() / 2, rng.random()])
            thresholds = [
                global_module_aware_unstructured(pairs_of(model, seed), amount=amount)
                for model in (alone, sharded)
            ]
            assert thresholds[0] == thresholds[1], (seed, thresholds)
            for i, (one, other) in enumerate(zip(alone.layers, sharded.layers)):
                assert torch.equal(one.weight_mask, whole(other.weight_mask)), (seed, i)
                assert torch.equal(one.weight_orig, whole(other.weight_orig)), (seed, i)
                assert torch.equal(one.weight, whole(other.weight)), (seed, i)
        for model in (alone, sharded):
            remove_all(model)
        for one, other in zip(alone.layers, sharded.layers):
            assert torch.equal(one.weight, whole(other.weight))
            assert list(one.state_dict()) == list(other.state_dict()) == ["weight", "bias"]


@pytest.mark.filterwarnings("ignore:.*have lost all")
@pytest.mark.parametrize(
    ("processes", "ways"),
    [(1, ["fully_shard", "plan"]), (2, ["fully_shard", "plan"]), (4, list(WAYS))],
)
def test_masks_and_thresholds_are_those_of_the_unsharded_model(processes, ways, tmp_path):
    in_processes(processes, tmp_path, compare, range(10 * processes, 20 * processes), ways)
