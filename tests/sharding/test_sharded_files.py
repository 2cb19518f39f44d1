"""Files of sharded models: written as those of whole ones, read part by part."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import WAYS, in_processes, random_model, shard_fully, whole
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from torch_dimap import (
    global_module_aware_unstructured,
    load_pruned,
    prune_checkpoint,
    prune_like,
    remove_all,
    save_pruned,
)


def pairs_of(model):
    return [(layer, "weight") for layer in model.layers]


def assert_same_state(sharded, alone):
    state = alone.state_dict()
    assert list(sharded.state_dict()) == list(state)
    for name, tensor in sharded.state_dict().items():
        assert torch.equal(whole(tensor), state[name]), name


def write_and_read(folder, ways):
    own, shared = folder / str(dist.get_rank()), folder / "shared"
    for seed, way in enumerate(ways):
        rng = random.Random(seed)
        dtype = [torch.float32, torch.bfloat16][seed % 2]
        dense = random_model(seed, dtype, even=way == "both")
        alone, sharded = copy.deepcopy(dense), WAYS[way](copy.deepcopy(dense), rng)
        for model in (alone, sharded):
            global_module_aware_unstructured(pairs_of(model), amount=0.5)
        for kwargs in ({"hash_weights": True}, {}, {"masks_only": True}):
            save_pruned(alone, own, force=True, **kwargs)
            save_pruned(sharded, shared, force=True, **kwargs)
            dist.barrier()
            assert shared.read_bytes() == own.read_bytes(), (way, kwargs)
            dist.barrier()
            if not kwargs:
                save_pruned(alone, folder / f"{dist.get_rank()} with values", force=True)
        values, masks = folder / f"{dist.get_rank()} with values", own
        for path, masked in ((values, True), (values, False), (masks, True), (masks, False)):
            found = WAYS[way](copy.deepcopy(dense), rng)
            if path == values:
                with torch.no_grad():
                    [parameter.zero_() for parameter in found.parameters()]
            expected = load_pruned(copy.deepcopy(dense), path, masked=masked)
            assert_same_state(load_pruned(found, path, masked=masked), expected)
        found = WAYS[way](copy.deepcopy(dense), rng)
        for _ in range(2):  # dense, and masked already
            assert_same_state(prune_like(found, alone.state_dict()), alone)


@pytest.mark.filterwarnings("ignore:.*have lost all")
@pytest.mark.parametrize(
    ("processes", "ways"), [(2, ["fully_shard", "plan"] * 3), (4, ["both", "fully_shard"])]
)
def test_files_are_those_of_the_unsharded_model_and_load_into_shards(processes, ways, tmp_path):
    in_processes(processes, tmp_path, write_and_read, tmp_path, ways)


def refusals(folder):
    rank = dist.get_rank()
    dense = random_model(1, torch.float32)
    sharded = shard_fully(copy.deepcopy(dense), random.Random(1))

    def fails(error, match, call):
        with pytest.raises(error, match=match):
            call()
        dist.barrier()

    fails(ValueError, "must have masks", lambda: save_pruned(sharded, folder / "a"))
    global_module_aware_unstructured(pairs_of(sharded), amount=0.5)
    fails(ValueError, "same call",
          lambda: save_pruned(sharded, folder / "a", masks_only=rank == 1))  # fmt: skip
    fails(FileNotFoundError, "there is no folder", lambda: save_pruned(sharded, folder / "b" / "a"))
    save_pruned(sharded, folder / "a")
    before = (folder / "a").read_bytes()
    fails(FileExistsError, "exists", lambda: save_pruned(sharded, folder / "a"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:  # a full disk, met in the midst
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    fails(OSError, "cannot be written", lambda: save_pruned(sharded, folder / "a", force=True))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save_pruned(sharded, folder / "masks", masks_only=True)
    fails(RuntimeError, "must be dense", lambda: load_pruned(sharded, folder / "a"))

    fresh = shard_fully(copy.deepcopy(dense), random.Random(1))
    state = {name: whole(x).clone() for name, x in fresh.state_dict().items()}
    path = folder / ("nowhere" if rank == 1 else "a")  # a disk of its own
    fails(FileNotFoundError, "nowhere", lambda: load_pruned(fresh, path, masked=True))
    path = folder / ("masks" if rank == 1 else "a")
    fails(ValueError, "same call", lambda: load_pruned(fresh, path, masked=True))
    with torch.no_grad():
        fresh.layers[-1].weight.to_local().add_(1)
    state["layers.%d.weight" % (len(fresh.layers) - 1)] += 1
    fails(ValueError, "made for others", lambda: load_pruned(fresh, folder / "masks"))
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(whole(tensor), state[name])
    assert sorted(p for p in os.listdir(folder) if p != "rendezvous") == ["a", "masks"]
    assert (folder / "a").read_bytes() == before
    assert_same_state(remove_all(load_pruned(fresh, folder / "a", masked=True)),
                      load_pruned(dense, folder / "a"))  # fmt: skip


def test_what_fails_in_one_process_fails_in_all_and_leaves_the_file(tmp_path):
    in_processes(2, tmp_path, refusals, tmp_path)


def vit(**kwargs):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=512, num_heads=8, **kwargs
    )


def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def start_on_meta(folder):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for masked in (False, True):
        with torch.device("meta"):
            model = vit()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        model.to_empty(device="cpu")
        load_pruned(model, folder / "half", masked=masked)
        grown = memory("VmHWM") - before
        size = sum(parameter.numel() * 4 for parameter in model.parameters())
        assert masked or grown < 0.65 * size, (grown, size)  # its own half of 150 MB
        with torch.no_grad():
            outputs = model.eval()(images)
        torch.testing.assert_close(outputs, torch.load(folder / "outputs"), rtol=1e-4, atol=1e-5)
    alone = load_pruned(vit(), folder / "half", masked=True)
    assert_same_state(model, alone)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_a_checkpoint_is_pruned_and_loaded_with_nobody_holding_the_model_whole(tmp_path):
    model = vit().eval()
    state = list(model.state_dict().items())
    places = {}
    for i, part in enumerate((state[::2], state[1::2])):
        save_file(dict(part), tmp_path / f"{i}.safetensors")
        places |= {name: f"{i}.safetensors" for name, _ in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    prune_checkpoint(index, tmp_path / "half", 0.5, compressed=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.save(load_pruned(model, tmp_path / "half")(images), tmp_path / "outputs")
    in_processes(2, tmp_path, start_on_meta, tmp_path)
