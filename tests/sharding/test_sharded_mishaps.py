"""Sharded models as a caller may find them: still gathered, or after a forward that failed."""

from __future__ import annotations

import copy

import pytest
import torch
from processes import Blocks, in_processes, whole
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from torch_dimap import global_module_aware_unstructured


def models():
    """Return a model unsharded and sharded, of which a forward leaves the last layers gathered."""
    torch.manual_seed(0)
    alone = Blocks([(12, 12), (2, 12), (12, 2)])
    sharded = copy.deepcopy(alone)
    fully_shard(sharded.layers[0])
    return alone, fully_shard(sharded)


def pairs_of(model):
    return [(layer, "weight") for layer in model.layers]


def removed_by_hand():
    x = torch.ones(3, 12)
    alone, sharded = models()
    for model in (alone, sharded):
        global_module_aware_unstructured(pairs_of(model), amount=0.4)
        model(x)
        for layer in model.layers:
            prune.remove(layer, "weight")
    for one, other in zip(alone.layers, sharded.layers):
        assert torch.equal(one.weight, whole(other.weight))
    torch.testing.assert_close(sharded(x), alone(x))


def test_prune_remove_of_gathered_weights_holds(tmp_path):
    in_processes(2, tmp_path, removed_by_hand)


def failed_forward():
    x = torch.ones(3, 12)
    alone, sharded = models()

    def fail(*_):
        raise KeyError

    for _ in range(2):  # without masks, and with
        hook = sharded.layers[2].register_forward_hook(fail)
        with pytest.raises(KeyError):
            sharded(x)
        hook.remove()
        for model in (alone, sharded):
            global_module_aware_unstructured(pairs_of(model), amount=0.4)
        for one, other in zip(alone.layers, sharded.layers):
            assert hasattr(other.weight_orig, "full_tensor")
            assert torch.equal(one.weight_mask, other.weight_mask.full_tensor())
        torch.testing.assert_close(sharded(x), alone(x))


def test_weights_that_a_failed_forward_left_gathered_are_pruned(tmp_path):
    in_processes(2, tmp_path, failed_forward)
