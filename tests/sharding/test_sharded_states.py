"""States of sharded, masked models kept with torch.distributed.checkpoint, and averaged."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import in_processes, whole
from test_sharded_training import shard_blocks, swin
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from torch_dimap import global_module_aware_unstructured, group_parameters, remove_all


def build(sharded=True):
    """Return a model whose names are those of a masked one, and its optimizer."""
    model = shard_blocks(swin()) if sharded else swin()
    global_module_aware_unstructured(group_parameters(model), amount=0.0)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train_on(model, optimizer, steps, ema=None, sharded=True):
    """Step on one batch, of which each process has a part; return the last loss of all."""
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    if sharded:
        images = images.chunk(dist.get_world_size())[dist.get_rank()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        optimizer.step()
        for name, value in model.state_dict().items() if ema else ():
            if value.is_floating_point():
                ema[name].lerp_(value, 0.25)
            else:  # masks
                ema[name].copy_(value)
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def masks_of(state):
    return {name: whole(x) for name, x in state.items() if name.endswith("weight_mask")}


def save_states(folder):
    emas = []
    for sharded in (False, True):
        model, optimizer = build(sharded)
        global_module_aware_unstructured(group_parameters(model), amount=0.5)
        emas.append({name: value.clone() for name, value in model.state_dict().items()})
        train_on(model, optimizer, 2, emas[-1], sharded)
    for name, expected in emas[0].items():
        torch.testing.assert_close(whole(emas[1][name]), expected, rtol=1e-3, atol=1e-4)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)), ema=emas[1])
    dcp.save(parts, checkpoint_id=folder / "parts")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save(full, folder / "full")
    masks, average = masks_of(model.state_dict()), {k: whole(x) for k, x in emas[1].items()}
    loss = train_on(model, optimizer, 2)
    if dist.get_rank() == 0:
        torch.save((loss, masks, average), folder / "expected")


def load_states(folder):
    loss, masks, average = torch.load(folder / "expected")

    def check(model, optimizer):
        torch.testing.assert_close(train_on(model, optimizer, 2), loss, rtol=1e-4, atol=0)
        torch.testing.assert_close(masks_of(model.state_dict()), masks)
        remove_all(model)
        for name, mask in masks.items():
            assert not whole(model.state_dict()[name.removesuffix("_mask")])[~mask].any()

    model, optimizer = build()
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    states["ema"] = {name: value.clone() for name, value in model.state_dict().items()}
    dcp.load(states, checkpoint_id=folder / "parts")
    set_state_dict(
        model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    torch.testing.assert_close({k: whole(x) for k, x in states["ema"].items()}, average)
    dcp.save(states, checkpoint_id=folder / "again")  # from other processes than before
    check(model, optimizer)
    for from_first in (False, True):
        model, optimizer = build()
        here = not from_first or dist.get_rank() == 0
        of_model, of_optimizer = torch.load(folder / "full") if here else ({}, {})
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_first)
        # In one call, set_state_dict, torch waits for ever for those that come with nothing.
        set_model_state_dict(model, of_model, options=options)
        set_optimizer_state_dict(model, optimizer, of_optimizer, options=options)
        check(model, optimizer)
    if dist.get_world_size() == 1:
        model, optimizer = build(sharded=False)  # the names are those of an unsharded model, too
        of_model, of_optimizer = torch.load(folder / "full")
        set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
        check(model, optimizer)


def test_states_move_between_numbers_of_processes(tmp_path):
    in_processes(2, tmp_path, save_states, tmp_path)
    in_processes(1, tmp_path, load_states, tmp_path)
    (tmp_path / "parts").rename(tmp_path / "first")
    (tmp_path / "again").rename(tmp_path / "parts")
    in_processes(2, tmp_path, load_states, tmp_path)
