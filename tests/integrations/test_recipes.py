"""The recipes of docs/frameworks.md that need no callback, each with the real library."""

from __future__ import annotations

import argparse

import pytest
import timm
import torch
from conftest import make_swin
from timm.models import load_checkpoint, resume_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from torch_dimap import (
    PruningSchedule,
    group_parameters,
    load_pruned,
    prune_checkpoint,
    prune_like,
)

LABELS = torch.arange(4)


def start():
    model = make_swin().eval()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(model, optimizer, images, steps, schedule=None):
    for step in steps:
        if schedule:
            schedule.step(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), LABELS).backward()
        optimizer.step()


@pytest.mark.skipif(
    not hasattr(torch.serialization, "safe_globals"), reason="torch 2.4 cannot let one type in"
)
def test_timm_checkpoints_come_back_by_timms_own_calls(tmp_path, images, one_thread):
    """What train.py writes: a Namespace of arguments, an optimizer, an EMA."""
    model, optimizer = start()
    schedule = PruningSchedule(group_parameters(model), 0.6, end=1)
    ema = ModelEmaV3(model, decay=0.5)
    train(model, optimizer, images, range(3), schedule)
    ema.update(model)
    arguments = argparse.Namespace(model="swin", lr=1e-3)
    saver = CheckpointSaver(model, optimizer, arguments, ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")

    resumed, its_optimizer = start()
    prune_like(resumed, path)
    assert resume_checkpoint(resumed, path, its_optimizer, log_info=False) == 1
    train(model, optimizer, images, range(3, 5))
    train(resumed, its_optimizer, images, range(3, 5))
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)

    averaged = prune_like(make_swin(), path)
    load_checkpoint(averaged, path, use_ema=True)
    torch.testing.assert_close(averaged.state_dict(), ema.module.state_dict(), rtol=0, atol=0)
    prune_checkpoint(path, tmp_path / "baked.safetensors", 0.7)
    load_checkpoint(make_swin(), str(tmp_path / "baked.safetensors"))


def test_timm_reads_a_folder_of_the_hub_that_was_pruned(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "hub")
    prune_checkpoint(tmp_path / "hub", tmp_path / "half", 0.5)
    again = timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True, img_size=32,
                              depth=1, num_classes=3)  # fmt: skip
    expected = load_pruned(model, tmp_path / "half")
    torch.testing.assert_close(again.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_accelerate_states_come_back(tmp_path, images, one_thread):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def prepared(folder=None):
        model = make_swin().eval()
        if folder:
            prune_like(model, folder)
        schedule = PruningSchedule(group_parameters(model), 0.6, end=4, every=2)
        accelerator._models.clear(), accelerator._optimizers.clear()
        accelerator._custom_objects.clear()
        model, optimizer = accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=1e-3)
        )
        accelerator.register_for_checkpointing(schedule)
        return model, optimizer, schedule

    model, optimizer, schedule = prepared()
    train(model, optimizer, images, range(3), schedule)
    accelerator.save_state(str(tmp_path / "state"))
    train(model, optimizer, images, range(3, 6), schedule)
    resumed, its_optimizer, its_schedule = prepared(tmp_path / "state")
    accelerator.load_state(str(tmp_path / "state"))
    assert its_schedule.rounds_done == 2
    train(resumed, its_optimizer, images, range(3, 6), its_schedule)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
