"""Files made to do harm, or come to harm: always a ValueError, never anything worse.

The fuzzing is bounded to seconds. For a longer run:
``FUZZ_EXAMPLES=100000 python -m pytest tests/storage/test_hostile_files.py -k fuzz``.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from taken_apart import parts, place_of, rewrite, write
from torch import nn
from torch.nn.utils import prune

from torch_dimap import load_pruned, prune_checkpoint, save_pruned
from torch_dimap.command import main
from torch_dimap.storage.stored import open_weights

pytestmark = pytest.mark.usefixtures("one_thread")
fuzzing = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 300)),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def packed(tmp_path):
    """A compressed file of one layer of 21 weights, and what it holds."""
    torch.manual_seed(0)
    layer = nn.Linear(7, 3)
    prune.l1_unstructured(layer, "weight", amount=11)
    path = tmp_path / "packed.safetensors"
    save_pruned(layer, path, hash_weights=True)
    return path, load_pruned(path)


@pytest.mark.parametrize(
    "header, data, message",
    [
        ("", b"", "must be JSON"),
        ("{", b"", "must be JSON"),
        ("[1]", b"", "must be a JSON object"),
        ("{}", b"", "found no tensor in it"),
        ("[" * 100_000, b"", "must be JSON"),
        ('{"a": {}, "a": {}}', b"", "a key occurs twice"),
        ({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12), "begins at byte"),
        ({"a": tensor(), "b": tensor(offsets=(0, 8))}, bytes(8), "begins at byte"),
        ({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20), "begins at byte"),
        ({"a": tensor()}, bytes(7), "bytes long by its header"),
        ({"a": tensor()}, bytes(9), "bytes long by its header"),
        ({"a": tensor(offsets=(0, 4))}, bytes(4), "must take 8 bytes"),
        ({"a": tensor(offsets=(8, 0))}, bytes(8), "must take 8 bytes"),
        ({"a": tensor(offsets=(-8, 0))}, bytes(8), "must take 8 bytes"),
        ({"a": tensor(offsets=(0, 8.0))}, bytes(8), "two numbers as data_offsets"),
        ({"a": tensor(shape=(2**62, 2**62))}, bytes(8), "fits into memory"),
        ({"a": tensor(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b"", "fits into memory"),
        ({"a": tensor(shape=(-2,))}, bytes(8), "sizes that are not negative"),
        ({"a": tensor(shape=(True, 2))}, bytes(8), "sizes that are not negative"),
        ({"a": tensor(dtype="F33")}, bytes(8), "dtype that torch knows"),
        ({"a": tensor(dtype=["F32"])}, bytes(8), "dtype that torch knows"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "must tell dtype"),
        ({"a": [1]}, bytes(8), "must tell dtype"),
        ({"__metadata__": {"a": 1}, "a": tensor()}, bytes(8), "metadata of text"),
        ({"__metadata__": [], "a": tensor()}, bytes(8), "metadata of text"),
        ('{"a": {"dtype": "F32", "shape": [1' + "0" * 5000 + "]}}", b"", "must be JSON"),
    ],
)
def test_a_header_made_by_hand_is_refused(tmp_path, header, data, message):
    path = write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(ValueError, match=message):
        load_pruned(path)
    if message not in ("found no tensor in it", "fits into memory"):  # the library thinks so too
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass


@pytest.mark.parametrize("length", [0, 3, 10**6, 2**63, 2**64 - 1])
def test_a_wrong_length_of_the_header_is_refused(tmp_path, length):
    path = write(tmp_path / "a.safetensors", {"a": tensor()}, bytes(8), length)
    with pytest.raises(ValueError, match="a.safetensors must be"):
        load_pruned(path)


def test_every_truncated_file_is_refused(tmp_path, packed):
    path, _ = packed
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError):
            load_pruned(path)


def test_every_flipped_bit_of_the_data_is_refused(packed):
    path, _ = packed
    header, data = parts(path)
    content = path.read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(content)
        flipped[len(content) - len(data) + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="is damaged"):
            load_pruned(path)


def set_mask(header, record, data, value):
    data[place_of(header, "weight:mask")] = value


def grow(name, item, size):
    """Return a change that adds a tensor to the end of the file."""
    def change(header, record, data):
        begin = len(data)
        header[name] = {**item, "data_offsets": [begin, begin + size]}
        return data + bytes(size)
    return change  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, r, d: set_mask(h, r, d, b"\xff\xff\x1f"), "as many values as bits in its mask"),
        (lambda h, r, d: set_mask(h, r, d, b"\x00\x00\x00"), "as many values as bits in its mask"),
        (lambda h, r, d: set_mask(h, r, d, b"\x00\x00\xff"), "no bits in its mask behind the last"),
        (lambda h, r, d: r["pruned"]["weight"].update(shape=[7, 4]), "a mask of 4 bytes"),
        (lambda h, r, d: r["pruned"]["weight"].update(shape=[2**40, 2**40]), "fits into memory"),
        (lambda h, r, d: r["pruned"]["weight"].update(shape=[24]), None),
        (lambda h, r, d: r["pruned"]["weight"].update(dtype="F16"), "as many values as bits"),
        (lambda h, r, d: r["pruned"]["weight"].update(dtype="I32"), "floating-point dtype"),
        (lambda h, r, d: r["pruned"]["weight"].update(group=3), "group's name or null"),
        (lambda h, r, d: r["pruned"]["weight"].update(sha256="0" * 63), "64 hexadecimal digits"),
        (lambda h, r, d: r["pruned"].update(other=r["pruned"]["weight"]), "'other' must have a"),
        (lambda h, r, d: r["pruned"].clear(), None),  # the parts are then tensors like others
        (lambda h, r, d: r.update(format=3), "must be of format 1 or 2, found 3"),
        (lambda h, r, d: r.update(format=True), "must be of format 1 or 2, found True"),
        (lambda h, r, d: r.update(format=2), "found other fields"),
        (lambda h, r, d: r.update(operations={}), "found other fields"),
        (lambda h, r, d: r.update(content="odd"), "must hold one of compressed"),
        (lambda h, r, d: r.update(content="masks"), "must hold each tensor once"),
        (lambda h, r, d: r.update(content="dense"), "must be stored as its record says"),
        (lambda h, r, d: r.update(groups={"a": {"amount": 1}}), "amount and threshold, numbers"),
        (lambda h, r, d: r.update(groups=[]), "found other fields"),
        (lambda h, r, d: r.update(more=1), "found other fields"),
        (grow("weight", {"dtype": "F32", "shape": [3, 7]}, 84), "each tensor once"),
    ],
)
def test_a_record_made_by_hand_is_refused(packed, change, message):
    path, _ = packed
    rewrite(path, change)
    if message is None:
        assert load_pruned(path)
    else:
        with pytest.raises(ValueError, match=message):
            load_pruned(path)


def test_a_record_that_is_not_json_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for text in ("", "{", "[]", '{"format": 1, "format": 1}', "\ud800"):
        header = {"__metadata__": {"torch_dimap": text}, "a": tensor()}
        with pytest.raises(ValueError):
            load_pruned(write(path, header, bytes(8)))


def test_checksums_that_are_missing_are_refused(packed):
    path, _ = packed
    rewrite(path, lambda h, r, d: r["crc32"].pop("bias") and None, checksums=False)
    with pytest.raises(ValueError, match="a checksum for each of its tensors"):
        load_pruned(path)


def test_nothing_large_is_allocated_for_what_a_file_only_claims(tmp_path, packed):
    header = {"a": tensor(shape=(10**12,), offsets=(0, 4 * 10**12))}
    claims = [write(tmp_path / "a.safetensors", header, bytes(8))]
    claims.append(write(tmp_path / "b.safetensors", header, bytes(8), length=10**8))
    claims.append(rewrite(packed[0], lambda h, r, d: r["pruned"]["weight"].update(shape=[10**12])))
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "c.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in [*claims, tmp_path / "c.pth"]:
        with pytest.raises(ValueError):
            load_pruned(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/tmp/x.safetensors", "a/x", "a\\x", "..", ".", "", "x\0"]
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard):
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="must name files of its own folder"):
        prune_checkpoint(index, tmp_path / "out", 0.5)


@pytest.mark.parametrize(
    "index, message",
    [
        ("{", "must be JSON"),
        ({}, "must have a weight_map"),
        ({"weight_map": {"a": 1}}, "must have a weight_map"),
        ({"weight_map": {}}, "found no tensor"),
        ({"weight_map": {"a": "x.safetensors"}}, "'b' is missing in one of x.safetensors"),
        ({"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}}, "'c'"),
        ({"weight_map": {"a": "packed.safetensors"}}, "must name plain shards"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, packed, index, message):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    path = tmp_path / "a.safetensors.index.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(path, tmp_path / "out", 0.5)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, capsys, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Bomb()}, "bomb.pth",
               _use_new_zipfile_serialization=not legacy)  # fmt: skip
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pth", "bare.pth"):
        with pytest.raises(ValueError, match="must be a checkpoint|found posix.mkdir, which"):
            prune_checkpoint(name, "out", 0.5)
        assert main(["inspect", name]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert not os.path.exists("exploded")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/byteorder", "little")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("no weights at all, but more than eight bytes")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    os.mkfifo(tmp_path / "fifo")
    for name in ("a.zip", "empty", "text.safetensors", "list.pth", "fifo", "."):
        with pytest.raises(ValueError, match="must be a|must hold a state dict"):
            load_pruned(tmp_path / name)


def edits(size):
    """Draw changes to a file: places, and the bytes to put there, to add or to take away."""
    place = st.integers(0, size - 1)
    return st.lists(st.tuples(place, st.integers(0, 6), st.binary(max_size=6)), min_size=1,
                    max_size=4)  # fmt: skip


def edited(content, changes):
    for place, length, new in changes:
        content = content[:place] + new + content[place + length :]
    return content


def read_or_refuse(path):
    """Read all that a file holds; anything but a ValueError is a failure."""
    try:
        with open_weights(path) as weights:
            for entry in weights.entries.values():
                read = [values.numel() for values, _ in entry.blocks()]
                assert sum(read) == entry.kind.size
    except ValueError:
        return None
    return weights


@fuzzing
@given(data=st.data())
def test_fuzz_files_of_ours(packed, data):
    path, state = packed
    content = path.read_bytes()
    broken = path.with_name("broken.safetensors")
    broken.write_bytes(edited(content, data.draw(edits(len(content)))))
    if read_or_refuse(broken) and load_pruned(broken).keys() == state.keys():
        with safe_open(broken, "pt"):  # what we take, the library takes as well
            pass


@fuzzing
@given(data=st.data())
def test_fuzz_pickles(tmp_path, data):
    path, broken = tmp_path / "a.pth", tmp_path / "broken.pth"
    if not path.exists():
        torch.save({"a.weight": torch.ones(3, 5), "b": torch.ones(2).bfloat16()}, path)
    content = path.read_bytes()
    broken.write_bytes(edited(content, data.draw(edits(len(content)))))
    read_or_refuse(broken)


def test_a_directory_that_points_before_the_file_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a.weight": torch.ones(3, 5)}, path)
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\x06\x06") + 48  # of the number that says where the directory begins
    begin = int.from_bytes(content[place : place + 8], "little")
    content[place : place + 8] = (begin + 5000).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.pth must be a checkpoint"):
        with open_weights(path):
            pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@fuzzing
@given(data=st.data())
def test_fuzz_headers(packed, data):
    """Put any JSON in the place of any value of the header or of the record."""
    path, _ = packed
    header, rest = parts(path)
    record = json.loads(header["__metadata__"]["torch_dimap"])

    def replace_one(value):
        if not isinstance(value, (dict, list)) or not value or data.draw(st.integers(0, 4)) == 0:
            return data.draw(JSON)
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = data.draw(st.sampled_from(keys))
        value[key] = replace_one(value[key])
        return value

    if data.draw(st.booleans()):
        header["__metadata__"]["torch_dimap"] = json.dumps(replace_one(record))
    else:
        header = replace_one(header)
    read_or_refuse(write(path.with_name("broken.safetensors"), header, bytes(rest)))
