"""What becomes of the target: whole or untouched, whatever the disk or a kill does."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import make_swin
from state_files import save

from torch_dimap import expand_checkpoint, load_pruned, prune_checkpoint
from torch_dimap.storage import replacing
from torch_dimap.storage.stored import open_weights

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tmp_path):
    return save(make_swin().state_dict(), tmp_path / "dense.safetensors")


@pytest.fixture
def old(tmp_path):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"old")
    return target


def test_an_existing_target_needs_force(source, old):
    with pytest.raises(FileExistsError, match="exists: name another target, or pass force=True"):
        prune_checkpoint(source, old, 0.5)
    assert old.read_bytes() == b"old"
    old.chmod(0o640)
    prune_checkpoint(source, old, 0.5, force=True)
    assert len(load_pruned(old)) and old.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(old.parent)) == ["dense.safetensors", "out.safetensors"]


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_source_cannot_be_the_target(source, tmp_path, link):
    target = source
    if link:
        target = tmp_path / "other"
        link(source, target)
    before = source.read_bytes()
    for call in (lambda: prune_checkpoint(source, target, 0.5, force=True),
                 lambda: expand_checkpoint(source, target, force=True)):  # fmt: skip
        with pytest.raises(ValueError, match="must be another file than the source"):
            call()
    assert source.read_bytes() == before


def test_a_shard_of_the_source_cannot_be_the_target(tmp_path):
    save(make_swin().state_dict(), tmp_path / "a.safetensors.index.json", shards=2)
    with pytest.raises(ValueError, match="must be another file than the source"):
        prune_checkpoint(
            tmp_path / "a.safetensors.index.json", tmp_path / "part-1.safetensors", 0.5, force=True
        )


def test_a_symbolic_link_stays_and_its_file_is_replaced(source, old, tmp_path):
    (tmp_path / "folder").mkdir()
    link = tmp_path / "folder" / "link"
    link.symlink_to(old)
    prune_checkpoint(source, link, 0.5, force=True)
    assert link.is_symlink() and len(load_pruned(old))
    assert os.listdir(tmp_path / "folder") == ["link"]


@pytest.mark.parametrize("target", [".", "/dev/null"])
def test_a_target_that_is_no_file_is_refused(source, target):
    with pytest.raises(ValueError, match="must be a regular file"):
        prune_checkpoint(source, target, 0.5, force=True)


def test_a_read_only_target_and_a_missing_folder_are_refused(source, old, tmp_path):
    old.chmod(0o444)
    with pytest.raises(PermissionError, match="is read-only"):
        prune_checkpoint(source, old, 0.5, force=True)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        prune_checkpoint(source, tmp_path / "none" / "out", 0.5)
    assert old.read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(source, old):
    # A limit on the size of files does to a write what a full disk does.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match="out.safetensors cannot be written: File too large"):
            prune_checkpoint(source, old, 0.5, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert old.read_bytes() == b"old"
    assert sorted(os.listdir(old.parent)) == ["dense.safetensors", "out.safetensors"]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_any_error_of_the_disk_leaves_the_old_file_and_nothing_else(source, old, monkeypatch, call):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(replacing.os, call, full)
    with pytest.raises(OSError, match="cannot be written: No space left on device") as caught:
        prune_checkpoint(source, old, 0.5, force=True)
    assert caught.value.errno == errno.ENOSPC and old.read_bytes() == b"old"
    assert sorted(os.listdir(old.parent)) == ["dense.safetensors", "out.safetensors"]


def test_two_calls_cannot_write_the_same_file_at_once(tmp_path):
    with replacing.replacing(tmp_path / "a") as write:
        write(b"first", 0)
        with pytest.raises(OSError, match="another process is writing it"):
            with replacing.replacing(tmp_path / "a"):
                pass
    assert (tmp_path / "a").read_bytes() == b"first" and os.listdir(tmp_path) == ["a"]


def test_what_a_kill_left_is_written_over(tmp_path):
    (tmp_path / ".a.torch_dimap-part").write_bytes(b"half of something long")
    with replacing.replacing(tmp_path / "a") as write:
        write(b"new", 0)
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


# Forked off a process that has everything imported: a new one for each kill would spend
# its time on importing torch.
ENDLESS = """
import os, sys, torch
torch.set_num_threads(1)
from torch_dimap import prune_checkpoint
for line in sys.stdin:
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)
        while True:
            for amount in (0.25, 0.75):
                prune_checkpoint(*sys.argv[1:], amount, compressed=True, force=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def test_killed_at_20_random_moments_the_target_is_whole(tmp_path):
    state = {f"blocks.{i}.attn.qkv.weight": torch.randn(300, 300) for i in range(8)}
    source = save(state, tmp_path / "dense.safetensors")
    target = tmp_path / "out.safetensors"
    whole = set()
    start = time.perf_counter()
    for amount in (0.25, 0.75):
        prune_checkpoint(source, target, amount, compressed=True, force=True)
        whole.add(target.read_bytes())
    both = time.perf_counter() - start
    seed = random.randrange(1000)  # told when the test fails
    moments = random.Random(seed)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, source, target], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        seen = set()
        for _ in range(20):
            print("go", file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            time.sleep(moments.uniform(0, 3 * both))
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
            seen.add(target.read_bytes())
            assert seen <= whole, f"neither old nor new, seed {seed}"
            assert set(load_pruned(target)) == set(state)
        process.stdin.close()
    assert seen == whole, f"never seen the other file, seed {seed}"
    left = set(os.listdir(tmp_path)) - {"dense.safetensors", "out.safetensors"}
    assert left <= {".out.safetensors.torch_dimap-part"}
    prune_checkpoint(source, target, 0.25, compressed=True, force=True)
    assert sorted(os.listdir(tmp_path)) == ["dense.safetensors", "out.safetensors"]


def test_a_source_that_shrinks_while_it_is_read_is_an_error(source):
    with open_weights(source) as weights:
        os.truncate(source, 5000)
        with pytest.raises(ValueError, match="cut while it was read"):
            for entry in weights.entries.values():
                list(entry.blocks())


def test_safetensors_reads_what_was_written_and_the_other_way(tmp_path, source):
    prune_checkpoint(source, tmp_path / "out", 0.0)
    expected = safetensors.torch.load_file(source)
    found = safetensors.torch.load_file(tmp_path / "out")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
