"""Files of models whose attentions were replaced: there and back, and nothing trusted."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import torch_dimap
from torch_dimap import learning, load_pruned, save_pruned

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small_vit(**more):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=4,
        num_classes=5, **more,
    )  # fmt: skip


def small_swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=4, window_size=4, embed_dim=24,
        depths=(2, 2), num_heads=(2, 4), num_classes=5,
    )  # fmt: skip


BUILDS = {"vit": small_vit, "vit without biases": lambda: small_vit(qkv_bias=False),
          "swin": small_swin}  # fmt: skip


def found(model, skip="zero"):
    """Give a model operations of all kinds, and fewer neurons."""
    names = [name for name, _ in model.named_modules() if name.endswith(".attn")]
    operations = dict(zip(names, ["conv1", "skip", "conv3", "attention"]))
    learning.replace_attentions(model, operations, skip=skip)
    units = torch_dimap.group_units(model)
    torch_dimap.global_module_aware_structured({"neurons": units["neurons"]}, 0.5)
    torch_dimap.remove_units(model)
    return model.eval()


@pytest.fixture(params=BUILDS)
def saved(request, tmp_path):
    model = found(BUILDS[request.param]())
    learning.collapse_convolutions(model)
    save_pruned(model, tmp_path / "found.safetensors")
    return BUILDS[request.param], model, tmp_path / "found.safetensors"


def test_a_fresh_model_becomes_the_saved_one_bit_for_bit(saved):
    build, model, path = saved
    fresh = load_pruned(build(), path).eval()
    assert torch.equal(fresh(IMAGES), model(IMAGES))
    again = path.with_name("again.safetensors")
    save_pruned(fresh, again)
    assert again.read_bytes() == path.read_bytes()


def test_masks_on_top_come_back_too(saved):
    build, model, path = saved
    groups = torch_dimap.group_parameters(model)
    torch_dimap.global_module_aware_unstructured(groups, amount=0.5)
    masked = path.with_name("masked.safetensors")
    save_pruned(model, masked)
    fresh = load_pruned(build(), masked, masked=True).eval()
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(fresh(IMAGES), model(IMAGES))


def test_a_skip_that_passes_its_input_on_is_told_from_one_that_gives_nothing(tmp_path):
    model = found(small_vit(), skip="norm")
    learning.collapse_convolutions(model)
    save_pruned(model, tmp_path / "norm.safetensors")
    fresh = load_pruned(small_vit(), tmp_path / "norm.safetensors").eval()
    assert torch.equal(fresh(IMAGES), model(IMAGES))


def test_convolutions_that_mix_heads_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="blocks.0.attn mixes the heads.*collapse_convolutions"):
        save_pruned(found(small_vit()), tmp_path / "shared.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("operations, error", [
    ({"blocks.0.attn": {"conv1": 7}}, "conv1 of 7 in the place of blocks.0.attn, which must be 6"),
    ({"blocks.0.attn": {"skip": 2}}, "which must be 0 or 1"),
    ({"blocks.9.attn": {"skip": 0}}, "'skip' in the place of 'blocks.9.attn'"),
    ({"blocks.0.attn": {"skip": 0, "heads": 2}}, "must tell of one operation"),
    ({"blocks.0.attn": {"conv5": 6}}, "'conv5' removed from 'blocks.0.attn'"),
    ({"blocks.0.attn": {"conv3": 6}}, "one of them only or of another shape"),
])  # fmt: skip
def test_hostile_operations_are_refused_and_leave_the_model(tmp_path, operations, error):
    model = found(small_vit())
    learning.collapse_convolutions(model)
    save_pruned(model, tmp_path / "good.safetensors")
    with safe_open(tmp_path / "good.safetensors", "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["torch_dimap"])
    record["operations"] = {**record["operations"], **operations}
    metadata["torch_dimap"] = json.dumps(record)
    save_file(load_file(tmp_path / "good.safetensors"), tmp_path / "bad.safetensors", metadata)
    fresh = small_vit().eval()
    before, kinds = fresh(IMAGES), [type(m) for m in fresh.modules()]
    with pytest.raises(ValueError, match=error):
        load_pruned(fresh, tmp_path / "bad.safetensors")
    assert [type(m) for m in fresh.modules()] == kinds
    assert torch.equal(fresh(IMAGES), before)


def test_other_models_are_refused(saved):
    _, _, path = saved
    with pytest.raises(ValueError, match="one of timm's ViTs"):
        load_pruned(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)


def test_inspect_tells_of_the_operations(saved, capsys):
    from torch_dimap.command import main

    _, _, path = saved
    main(["inspect", str(path)])
    out = capsys.readouterr().out
    assert "conv1 in the place of 1 attentions" in out
    assert "skip in the place of 1 attentions" in out


def test_counts_and_summaries_are_those_of_what_is_left(saved):
    build, model, _ = saved
    flops = torch_dimap.count_flops(model, IMAGES[:1])
    assert flops.dense < torch_dimap.count_flops(build(), IMAGES[:1]).dense
    text = str(torch_dimap.summarize(model, IMAGES[:1]))
    assert "In the place of attentions: 1 conv1, " in text and "1 skip" in text
