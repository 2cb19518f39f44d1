"""Folders of the Hugging Face hub, and the names that transformers gives in memory."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from torch_dimap import (
    expand_checkpoint,
    global_module_aware_unstructured,
    group_parameters,
    load_pruned,
    prune_checkpoint,
    prune_like,
    save_pruned,
)
from torch_dimap.command import main

transformers = pytest.importorskip("transformers")
KINDS = {
    "Swin": dict(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
                 window_size=4, num_labels=3),
    "ViT": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                image_size=16, patch_size=4, num_labels=3),
}  # fmt: skip
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def build(kind: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind])
    return getattr(transformers, f"{kind}ForImageClassification")(config).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IMAGES).logits


def assert_same_outputs(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=0)


@pytest.fixture(params=KINDS)
def hub(request, tmp_path):
    """A folder of the hub, and the same model pruned in memory."""
    model = build(request.param)
    model.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "README.md").write_text("about it")
    (tmp_path / "hub" / "optimizer.pt").write_bytes(b"a training's state")
    global_module_aware_unstructured(group_parameters(model), amount=0.5)
    return request.param, tmp_path, model


def test_prune_of_a_folder_gives_one_that_from_pretrained_reads(hub, capsys):
    kind, folder, pruned = hub
    assert main(["prune", str(folder / "hub"), str(folder / "half"), "--amount", "50%"]) == 0
    assert sorted(os.listdir(folder / "half")) == ["README.md", "config.json", "model.safetensors"]
    loaded = type(pruned).from_pretrained(folder / "half").eval()
    assert_same_outputs(loaded, pruned)


def test_compressed_files_of_hub_names_load_into_memory_names(hub):
    kind, folder, pruned = hub
    path = folder / "half.safetensors"
    prune_checkpoint(folder / "hub" / "model.safetensors", path, 0.5, compressed=True)
    assert set(load_pruned(path)) != set(build(kind).state_dict())  # they are renamed
    assert_same_outputs(load_pruned(build(kind, seed=1), path), pruned)
    assert_same_outputs(load_pruned(build(kind, seed=1), path, masked=True), pruned)
    base = load_pruned(build(kind, seed=1).base_model, path)
    torch.testing.assert_close(
        base(IMAGES).last_hidden_state, pruned.base_model(IMAGES).last_hidden_state
    )


def test_files_of_memory_names_are_read_by_from_pretrained(hub):
    kind, folder, pruned = hub
    save_pruned(pruned, folder / "half.safetensors")
    expand_checkpoint(folder / "half.safetensors", folder / "whole.safetensors")
    os.replace(folder / "whole.safetensors", folder / "hub" / "model.safetensors")
    assert_same_outputs(type(pruned).from_pretrained(folder / "hub").eval(), pruned)


def test_a_masked_folder_is_said_to_be_one_and_expanded(hub, capsys):
    kind, folder, pruned = hub
    masked = folder / "masked"
    pruned.save_pretrained(masked)  # which from_pretrained would fill with random weights
    assert main(["inspect", str(masked)]) == 0
    assert "from_pretrained would fill these layers with random weights" in capsys.readouterr().out
    assert_same_outputs(load_pruned(build(kind, seed=1), masked, masked=True), pruned)
    assert main(["expand", str(masked), str(folder / "whole")]) == 0
    assert_same_outputs(type(pruned).from_pretrained(folder / "whole").eval(), pruned)
    ready = prune_like(build(kind, seed=1), masked)
    assert ready.state_dict().keys() == pruned.state_dict().keys()


def test_shards_become_one_file(tmp_path):
    model = build("ViT")
    model.save_pretrained(tmp_path / "hub", max_shard_size="40KB")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 1
    prune_checkpoint(tmp_path / "hub", tmp_path / "half", 0.5)
    assert sorted(os.listdir(tmp_path / "half")) == ["config.json", "model.safetensors"]
    global_module_aware_unstructured(group_parameters(model), amount=0.5)
    assert_same_outputs(type(model).from_pretrained(tmp_path / "half").eval(), model)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from torch_dimap.files import streaming

    build("ViT").save_pretrained(tmp_path / "hub")
    monkeypatch.setattr(streaming, "write_weights", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune_checkpoint(tmp_path / "hub", tmp_path / "half", 0.5)
    assert os.listdir(tmp_path) == ["hub"]


def test_folders_that_must_not_be_written_or_hold_nothing_are_refused(tmp_path):
    hub = tmp_path / "hub"
    build("ViT").save_pretrained(hub)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    for source, target, options, error, message in [
        (hub, hub, {}, ValueError, "must lie outside of"),
        (hub, hub / "half", {}, ValueError, "must lie outside of"),
        (hub, tmp_path / "taken", {}, OSError, "must be a new or an empty folder"),
        (hub, tmp_path / "taken", {"force": True}, OSError, "must be a new or an empty folder"),
        (hub, tmp_path / "half", {"compressed": True}, ValueError, "a folder must get whole"),
        (tmp_path / "empty", tmp_path / "half", {}, ValueError, "a folder without model.safeten"),
    ]:
        with pytest.raises(error, match=message):
            prune_checkpoint(source, target, 0.5, **options)
    assert sorted(os.listdir(tmp_path)) == ["empty", "hub", "taken"]
    assert sorted(os.listdir(hub)) == ["config.json", "model.safetensors"]


def test_amounts_by_group_and_in_percent(tmp_path, capsys):
    state = {f"blocks.{i}.attn.qkv.weight": torch.randn(12, 4) for i in range(2)}
    state |= {f"blocks.{i}.attn.proj.weight": torch.randn(4, 4) for i in range(2)}
    state |= {f"blocks.{i}.mlp.fc1.weight": torch.randn(8, 4) for i in range(2)}
    save_file(state, tmp_path / "dense.safetensors")
    source, target = str(tmp_path / "dense.safetensors"), str(tmp_path / "out.safetensors")
    assert main(["prune", source, target, "--amount", "qkv=0.25", "mlp=50%"]) == 0
    record = json.loads(_metadata(target)["torch_dimap"])
    assert {name: group["amount"] for name, group in record["groups"].items()} == {
        "qkv": 0.25, "proj": 0.0, "mlp": 0.5,
    }  # fmt: skip
    assert load_file(target)["blocks.0.attn.proj.weight"].count_nonzero() == 16
    for amounts in (["0.5", "mlp=0.5"], ["mlp=0.5", "mlp=0.3"], ["0.5", "0.3"]):
        assert main(["prune", source, target, "--force", "--amount", *amounts]) == 1
        assert "one for all groups, or each group's once" in capsys.readouterr().err
    assert main(["prune", source, target, "--force", "--amount", "mpl=0.5"]) == 1
    assert "must name the groups" in capsys.readouterr().err


def _metadata(path: str) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()
