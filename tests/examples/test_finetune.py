"""The fine-tuning example: exact through kills and processes, clear in its refusals."""

from __future__ import annotations

import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import finetune
import methods
import numpy as np
import pytest
import scripts
import timm
import torch
import torch.distributed as dist
import training
from safetensors.torch import load_file
from small_swin import KWARGS, PRUNABLE, SMALL, SWIN

import torch_dimap

# Without chance in the images, processes and batches can be told apart by rounding alone.
PLAIN = ["--augmentation", "none", "--amp", "none"]


def arguments(data, output, *more):
    recipe = ["--epochs", 3, "--warmup-epochs", 1, "--batch-size", 8, "--lr", 1e-3, "--workers", 0]
    start = [] if "--checkpoint" in more else ["--random-init"]
    words = [SWIN, *start, "--model-kwargs", *KWARGS, "--data", data, "--output", output, *recipe]
    return [str(word) for word in (*words, "--device", "cpu", *more)]


@pytest.fixture
def run(monkeypatch, one_thread):
    """Run the script in this process, with a single thread, as the others are run."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
        finetune.main()

    return run


def start(output, *words, **environment):
    """Start the script in a process of its own, which prints to a file beside its output."""
    path = output.with_suffix(".txt")
    return scripts.start("examples/finetune.py", *words, stdout=path, stderr=path, **environment)


def printed(output):
    return output.with_suffix(".txt").read_text()


def wait_for_an_epoch(output, process):
    while not (output / "log.csv").exists() and process.is_alive():
        time.sleep(0.01)


def log(output):
    with open(output / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def column(output, key):
    return [float(row[key]) for row in log(output)]


def assert_same_but_for_rounding(*outputs, weights_within=1e-5):
    for key, tolerance in (("loss", 1e-5), ("top1", 0), ("zeros", 0), ("lr", 0)):
        np.testing.assert_allclose(*(column(output, key) for output in outputs), rtol=tolerance)
    weights = (load_file(output / "model.safetensors") for output in outputs)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=weights_within)


def test_finetune_prunes_bakes_and_saves_a_plain_model(data, tmp_path, run):
    run(*arguments(data, tmp_path / "out", "--amount", 0.55))
    assert [row["zeros"] for row in log(tmp_path / "out")] == [str(round(0.55 * PRUNABLE))] * 3
    assert sorted(os.listdir(tmp_path / "out")) == ["last.pth", "log.csv", "model.safetensors"]
    path = tmp_path / "out" / "model.safetensors"
    model = timm.create_model(SWIN, num_classes=2, checkpoint_path=str(path), **SMALL)
    zeros = {name: int((p == 0).sum()) for name, p in model.named_parameters() if p.dim() == 2}
    assert sum(zeros.values()) - zeros.get("head.fc.weight", 0) >= round(0.55 * PRUNABLE)


def test_finetune_learns_and_follows_the_recipe_of_the_learning_rate(data, tmp_path, run):
    run(*arguments(data, tmp_path / "out", "--amount", 0.3, "--epochs", 6, "--min-lr", 1e-5,
                   *PLAIN))  # fmt: skip
    losses, rates = (column(tmp_path / "out", key) for key in ("loss", "lr"))
    assert losses[-1] < losses[0]
    assert rates[0] == max(rates) == 1e-3 and rates[-1] == pytest.approx(1e-5)


@pytest.mark.parametrize("method", ["dimap", "single", "uniform", "global", "random"])
def test_finetune_reaches_the_amount_in_rounds(data, tmp_path, run, method):
    run(*arguments(data, tmp_path / "out", "--amount", 0.8, "--steps", 2, "--epochs", 4,
                   "--method", method, "--ema-decay", 0.5, "--accumulate", 2))  # fmt: skip
    early, late = round(0.7 * PRUNABLE), round(0.8 * PRUNABLE)  # 0.8 * (1 - (1 / 2) ** 3)
    zeros = column(tmp_path / "out", "zeros")
    assert zeros[0] == zeros[1] == pytest.approx(early, abs=3)  # each group is rounded by itself
    assert zeros[2] == zeros[3] == pytest.approx(late, abs=3)
    if method == "dimap":
        model = timm.create_model(SWIN, num_classes=2, **SMALL)
        methods.prune_to(model, method, 0.8)
        at_once = sum(int((mask == 0).sum()) for mask in finetune.masks(model).values())
        assert zeros[-1] == at_once


def test_finetune_without_an_amount_trains_a_dense_model(data, tmp_path, run):
    run(*arguments(data, tmp_path / "out", "--amount", 0))
    assert column(tmp_path / "out", "zeros") == [0, 0, 0]
    model = timm.create_model(SWIN, num_classes=2, **SMALL)
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))


def test_finetune_masks_whole_units_and_saves_the_model_without_them(
    data, tmp_path, run, monkeypatch
):
    words = ("--amount", 0.5, "--steps", 2, "--method", "units", "--ema-decay", 0.5)
    whole, broken = (arguments(data, tmp_path / name, *words) for name in ("whole", "broken"))
    run(*whole)
    # 2 and 4 heads, 64 and 128 neurons: half of both kinds.
    model, slim = (
        timm.create_model(SWIN, num_classes=2, **SMALL),
        load_file(tmp_path / "whole" / "slim.safetensors"),
    )
    model.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
    torch_dimap.remove_units(model)
    torch.testing.assert_close(dict(model.state_dict()), slim, rtol=0, atol=0)
    units = torch_dimap.group_units(model)
    assert {kind: sum(x.units for x in layers) for kind, layers in units.items()} == {
        "heads": 3, "neurons": 96,
    }  # fmt: skip

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    save = finetune.save
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(finetune, "save", save_and_stop)
        run(*broken)
    assert len(log(tmp_path / "broken")) == 1
    run(*broken, "--resume")
    assert column(tmp_path / "broken", "loss") == column(tmp_path / "whole", "loss")
    one, other = (tmp_path / name / "slim.safetensors" for name in ("whole", "broken"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_finetune_learns_in_half_precision(data, tmp_path, run, amp):
    run(*arguments(data, tmp_path / "out", "--amount", 0.3, "--epochs", 6, "--augmentation", "none",
                   "--amp", amp, "--ema-decay", 0.5))  # fmt: skip
    losses = column(tmp_path / "out", "loss")
    assert losses[-1] < losses[0]
    run(*arguments(data, tmp_path / "out", "--amount", 0.3, "--epochs", 6, "--augmentation", "none",
                   "--amp", amp, "--ema-decay", 0.5, "--resume"))  # fmt: skip
    assert column(tmp_path / "out", "loss") == losses


def test_finetune_accumulates_to_the_same_losses(data, tmp_path, run):
    run(*arguments(data, tmp_path / "once", "--amount", 0.5, *PLAIN))
    run(*arguments(data, tmp_path / "parts", "--amount", 0.5, *PLAIN, "--batch-size", 4,
                   "--accumulate", 2))  # fmt: skip
    once, parts = (column(tmp_path / name, "loss") for name in ("once", "parts"))
    np.testing.assert_allclose(once, parts, rtol=1e-5)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_finetune_in_two_processes_has_the_losses_of_one(data, tmp_path, run):
    words = ("--amount", 0.5, "--steps", 2, "--ema-decay", 0.5, *PLAIN)
    run(*arguments(data, tmp_path / "one", *words))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, scripts.ROOT / "examples" / "finetune.py",
         *arguments(data, tmp_path / "two", *words, "--batch-size", 4)],
        env={**os.environ, "PYTHONPATH": str(scripts.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("count, world, size", [(16, 2, 4), (3, 2, 1), (17, 2, 1), (1, 2, 8),
                                                (5, 4, 2), (4, 4, 8), (33, 3, 5)])  # fmt: skip
def test_images_are_shared_in_equally_many_batches(count, world, size):
    images = torch.arange(count)
    shares = [training.share_of(images, rank, world, size) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert all(0 < len(batch) <= size + 1 for share in shares for batch in share)
    seen = torch.cat([batch for share in shares for batch in share])
    copies = world if count < world else 1
    assert torch.equal(seen.sort().values, images.repeat_interleave(copies))


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_finetune_sharded_has_the_losses_of_one_process_and_resumes_on_others(data, tmp_path, run):
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has fully_shard elsewhere")
    words = ("--amount", 0.5, "--steps", 2, "--ema-decay", 0.5, "--epochs", 6, "--reconstruct", 16,
             *PLAIN)  # fmt: skip
    run(*arguments(data, tmp_path / "one", *words))
    sharded = arguments(data, tmp_path / "two", *words, "--batch-size", 4, "--fsdp")
    output = tmp_path / "two"
    processes = [start(output, *sharded, **rank) for rank in scripts.as_torchrun(2)]
    wait_for_an_epoch(output, processes[0])
    for process in processes:
        process.terminate()
        process.join()
    assert 1 <= len(log(output)) < 6, printed(output)
    shutil.copytree(tmp_path / "two", tmp_path / "other")
    done = scripts.run("examples/finetune.py", *sharded, "--resume", processes=2)
    assert done.returncode == 0, done.stderr
    # Of sums in another order a refit ends a little elsewhere.
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "two", weights_within=1e-3)
    run(*arguments(data, tmp_path / "other", *words, "--batch-size", 4, "--resume"))
    assert column(tmp_path / "other", "zeros") == column(tmp_path / "one", "zeros")
    assert sorted(os.listdir(tmp_path / "other")) == sorted(os.listdir(tmp_path / "two"))


def test_finetune_resumes_after_a_kill_to_the_same_weights(data, tmp_path, run):
    words = ("--amount", 0.6, "--steps", 3, "--method", "random", "--ema-decay", 0.9,
             "--epochs", 9)  # fmt: skip
    whole, killed = (arguments(data, tmp_path / name, *words) for name in ("whole", "killed"))
    run(*whole)
    process = start(tmp_path / "killed", *killed)
    wait_for_an_epoch(tmp_path / "killed", process)
    time.sleep(0.1)
    process.kill()
    process.join()
    assert process.exitcode == -9, printed(tmp_path / "killed")
    done = len(log(tmp_path / "killed"))
    assert 1 <= done < 9
    run(*killed, "--resume")
    assert len(log(tmp_path / "killed")) == 9
    for key in ("loss", "top1", "zeros", "lr"):
        assert column(tmp_path / "whole", key) == column(tmp_path / "killed", key)
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_finetune_reconstructs_once_and_resumes_to_the_same_weights(
    data, tmp_path, run, monkeypatch
):
    words = ("--amount", 0.7, "--reconstruct", 12)
    run(*arguments(data, tmp_path / "whole", *words))
    stopped = arguments(data, tmp_path / "stopped", *words)
    epoch = finetune.run_epoch

    def stop_at_the_second(training, *others):
        if training.epochs_done == 1:
            raise KeyboardInterrupt
        return epoch(training, *others)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "run_epoch", stop_at_the_second)
        with pytest.raises(SystemExit):
            run(*stopped)
    run(*stopped, "--resume")
    assert contents(tmp_path / "stopped")["model.safetensors"] == contents(tmp_path / "whole")[
        "model.safetensors"]  # fmt: skip
    run(*arguments(data, tmp_path / "plain", "--amount", 0.7))
    assert column(tmp_path / "plain", "loss")[0] != column(tmp_path / "whole", "loss")[0]


def test_finetune_says_how_to_go_on_after_ctrl_c(data, tmp_path):
    words = arguments(data, tmp_path / "out", "--amount", 0.5, "--epochs", 30)
    process = start(tmp_path / "out", *words)
    wait_for_an_epoch(tmp_path / "out", process)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    output = printed(tmp_path / "out")
    assert process.exitcode == 130, output
    assert "stopped; --resume goes on" in output
    # Interrupted while it makes a bar, tqdm complains when the half-made bar is deleted.
    assert "Traceback" not in output.partition("Exception ignored")[0]
    torch.load(tmp_path / "out" / "last.pth", weights_only=True)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The output of a run, and its arguments."""
    output = tmp_path_factory.mktemp("finished") / "out"
    words = arguments(data, output, "--amount", 0.5, "--epochs", 2)
    done = scripts.run("examples/finetune.py", *words)
    assert done.returncode == 0, done.stderr
    return output, words


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(run, words, *messages):
    with pytest.raises(SystemExit) as caught:
        run(*words)
    for message in messages:
        assert message in str(caught.value)


def test_finetune_overwrites_nothing(finished, run):
    output, words = finished
    before = contents(output)
    refused(run, words, "is not an empty folder", "--resume")
    refused(run, [*words, "--resume", "--lr", "1", "--method", "single"], "--lr, --method")
    assert contents(output) == before


def test_finetune_refuses_to_resume_from_nothing_or_from_other_files(data, tmp_path, run):
    words = arguments(data, tmp_path, "--amount", 0.5, "--resume")
    refused(run, words, "there is no file", "last.pth")
    (tmp_path / "last.pth").write_bytes(b"text")
    refused(run, words, "last.pth must be written by this script")
    torch.save({"weights": torch.ones(1)}, tmp_path / "last.pth")
    refused(run, words, "last.pth must be written by this script")


def test_finetune_keeps_the_last_state_when_the_disk_is_full(data, tmp_path, run):
    words = arguments(data, tmp_path / "out", "--amount", 0.5, "--epochs", 8)
    process = start(tmp_path / "out", *words)
    wait_for_an_epoch(tmp_path / "out", process)
    process.kill()
    process.join()
    before = (tmp_path / "out" / "last.pth").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        refused(run, [*words, "--resume"], "cannot write", "last.pth", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out" / "last.pth").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path / "out") if "partial" in name]


def broken(data, folder, change):
    """Copy the data and break the copy."""
    for path in data.rglob("*.png"):
        target = folder / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    change(folder)
    return folder


def empty_a_class(folder):
    for path in (folder / "train" / "dark").iterdir():
        path.unlink()


def rename_a_class(folder):
    (folder / "validation" / "dark").rename(folder / "validation" / "night")


def cut_an_image(folder):
    path = folder / "train" / "dark" / "7.png"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (empty_a_class, ["train", "dark"]),
        (rename_a_class, ["the same classes", "dark", "night"]),
        (cut_an_image, ["cannot read the image", "7.png"]),
        (lambda folder: (folder / "train").rename(folder / "training"), ["no folder", "training"]),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_finetune_names_what_is_wrong_with_the_images(
    data, tmp_path, run, change, messages, workers
):
    folder = broken(data, tmp_path / "data", change)
    words = arguments(folder, tmp_path / "out", "--amount", 0.5, "--workers", workers)
    refused(run, words, *messages)
    assert not (tmp_path / "out").exists()


def test_finetune_refuses_weights_of_another_model(data, tmp_path, run):
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    words = arguments(data, tmp_path / "out", "--amount", 0.5, "--checkpoint", tmp_path / "vit.pth")
    refused(run, words, "vit.pth", SWIN)
    refused(run, [*words, "--checkpoint", "nowhere.pth"], "there is no file nowhere.pth")
    assert not (tmp_path / "out").exists()


def test_finetune_stops_at_a_loss_that_is_not_finite(data, tmp_path, run):
    words = arguments(data, tmp_path / "out", "--amount", 0.5, "--lr", 1e30, "--warmup-epochs", 0)
    refused(run, words, "the loss of epoch 1 is nan")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--amount", "1.5"], "--amount must lie between 0 and 1"),
        (["--amount", "0.5", "--steps", "9"], "--steps must lie between 1 and --epochs"),
        (["--amount", "0.5", "--warmup-epochs", "3"], "--warmup-epochs must lie below --epochs"),
        (["--amount", "0.5", "--batch-size", "7"], "--batch-size must be even for mixup"),
        (["--amount", "0.5", "--ema-decay", "1"], "--ema-decay must lie between 0 and 1"),
        (["--amount", "0.5", "--fsdp", "--method", "units"], "--fsdp cannot mask whole units"),
        (["--amount", "0.5", "--fsdp", "--method", "random"], "--fsdp prunes by the DIMAP score"),
        (["--amount", "0.5", "--fsdp", "--amp", "float16"], "--amp bfloat16 or none"),
    ],
)
def test_finetune_checks_its_options(data, tmp_path, run, capsys, words, message):
    with pytest.raises(SystemExit):
        run(*arguments(data, tmp_path / "out", *words))
    assert message in capsys.readouterr().err


def test_finetune_says_when_the_images_fill_no_step(data, tmp_path, run):
    words = arguments(data, tmp_path / "out", "--amount", 0.5, "--batch-size", 64)
    refused(run, words, "48 training images fill no step")


def test_finetune_shards_only_under_torchrun(data, tmp_path, run):
    refused(run, arguments(data, tmp_path / "out", "--amount", 0.5, "--fsdp"), "torchrun")


def test_finetune_opens_timms_data_sets(data, tmp_path, run):
    words = ("--amount", 0.5, "--epochs", 2, "--dataset")
    run(*arguments(data, tmp_path / "done", *words, "torch/image_folder"))
    assert column(tmp_path / "done", "epoch") == [1, 2]
    words = arguments(data, tmp_path / "out", *words, "torch/nothing")
    refused(run, words, "cannot open the split 'train' of torch/nothing")
