"""The Trainer of transformers: pruned in rounds, stopped, resumed, and in two processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import scripts
import torch

from torch_dimap import expand_checkpoint, load_pruned, remove_all

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

from torch_dimap.integrations.transformers import PruningCallback  # noqa: E402

PLAN = {"amount": 0.6, "begin": 1, "end": 7, "every": 3}  # rounds at 1, 4, 7


class Images(torch.utils.data.Dataset):
    """Noise, the same in every run."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict:
        generator = torch.Generator().manual_seed(i)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 3}


def build(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
        window_size=4, num_labels=3, drop_path_rate=0.0,
    )  # fmt: skip
    return transformers.SwinForImageClassification(config)


def trainer(folder, model, steps, callback, batch=4):
    # The learning rate must not depend on where a run is to stop.
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=4, per_device_train_batch_size=batch,
        learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, report_to=[],
        disable_tqdm=True, use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Images(), callbacks=[callback])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of ten updates without a break: its folder, its log, its weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, build(), 10, PruningCallback(**PLAN))
    run.train()
    yield folder, run.state.log_history, remove_all(run.model).state_dict()
    torch.set_num_threads(threads)


def test_a_run_that_resumes_ends_in_the_same_weights(whole):
    folder, _, expected = whole
    model = load_pruned(build(seed=1), folder / "checkpoint-4", masked=True)
    callback = PruningCallback(**PLAN)
    run = trainer(folder / "again", model, 10, callback)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert callback.schedule.rounds_done == 3
    found = remove_all(model).state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_density_is_logged(whole):
    _, log, _ = whole
    found = {entry["step"]: entry["density"] for entry in log if "loss" in entry}
    shares = [1 - (2 / 3) ** 3, 1 - (1 / 3) ** 3, 1]
    expected = [1.0, *(1 - 0.6 * share for share in shares for _ in range(3))]
    assert list(found.values()) == pytest.approx(expected, abs=1e-3)


def test_a_checkpoint_becomes_what_from_pretrained_reads(whole, tmp_path):
    folder, _, _ = whole
    expand_checkpoint(folder / "checkpoint-8", tmp_path / "baked")
    loaded = type(build()).from_pretrained(tmp_path / "baked")
    expected = load_pruned(build(), folder / "checkpoint-8")
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_resume_that_passes_over_the_weights_is_refused(whole, tmp_path):
    folder, _, _ = whole
    run = trainer(tmp_path, build(seed=1), 10, PruningCallback(**PLAN))
    run._load_from_checkpoint = lambda *_, **__: None  # what it comes to for renamed weights
    with pytest.raises(RuntimeError, match="resumes at step 4 must have masks, found none"):
        run.train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_a_callback_that_comes_too_late_is_refused(tmp_path):
    run = trainer(tmp_path, build(), 2, transformers.TrainerCallback())
    run.add_callback(PruningCallback(**PLAN))
    with pytest.raises(RuntimeError, match=r"must be passed as Trainer\(callbacks"):
        run.train()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_of_accelerate_come_to_the_masks_of_one(whole, tmp_path):
    """Two processes with half of each batch: the same batches, so the same weights."""
    done = scripts.run("tests/integrations/test_trainer.py", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["processes"] == 2 and found["rounds"] == 3
    weights = load_pruned(build(), tmp_path / "checkpoint-8")
    expected = load_pruned(build(), whole[0] / "checkpoint-8")
    torch.testing.assert_close(weights.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-4)


def train_in_this_process(folder: str) -> None:
    callback = PruningCallback(**PLAN)
    run = trainer(folder, build(), 8, callback, batch=2)
    run.train()
    if run.is_world_process_zero():
        found = {"processes": run.args.world_size, "rounds": callback.schedule.rounds_done}
        Path(folder, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    train_in_this_process(sys.argv[1])
