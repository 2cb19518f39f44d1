"""Models that have lost units, saved and loaded into fresh dense ones; and hostile records."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
import timm
import torch
from conftest import make_swin, make_vit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from taken_apart import parts, rewrite
from torch import nn
from torch.nn.utils import prune

import torch_dimap.files.loading
from torch_dimap import (
    expand_checkpoint,
    global_module_aware_structured,
    global_module_aware_unstructured,
    group_parameters,
    group_units,
    load_pruned,
    prune_checkpoint,
    remove_all,
    remove_units,
    save_pruned,
)
from torch_dimap.files import inspect_checkpoint
from torch_dimap.units import Part, UnitLayer

pytestmark = pytest.mark.usefixtures("one_thread")


MODELS = {"swin": make_swin, "vit": make_vit}


def make_slim(make, amount=0.5, **kwargs) -> nn.Module:
    """Return a model that has lost units chosen at random, uneven numbers of them."""
    model = make()
    units = group_units(model)
    generator = torch.Generator().manual_seed(2)
    scores = {
        layer: torch.rand(layer.units, generator=generator)
        * torch.rand((), generator=generator)
        for layers in units.values()
        for layer in layers
    }
    global_module_aware_structured(
        units, amount, scores, multiple=1, pruning_method=prune.L1Unstructured, **kwargs
    )
    return remove_units(model).eval()


def record_of(path):
    return json.loads(parts(path)[0]["__metadata__"]["torch_dimap"])


def state_of(model):
    """Return all that a failed call must leave: the tensors, themselves and their bits."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {name: (tensor, tensor.detach().clone()) for name, tensor in tensors.items()}
    numbers = [
        (type(m), {k: v for k, v in vars(m).items() if isinstance(v, (int, dict)) and k[0] != "_"})
        for m in model.modules()
    ]
    return kept, numbers


def assert_untouched(model, before):
    (found, numbers), (kept, old_numbers) = state_of(model), before
    assert numbers == old_numbers and list(found) == list(kept)
    for name, (tensor, values) in kept.items():
        assert found[name][0] is tensor and torch.equal(tensor, values), name


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


@pytest.fixture
def saved(tmp_path):
    """A slim Swin and its file."""
    slim = make_slim(make_swin)
    save_pruned(slim, tmp_path / "slim.safetensors")
    return slim, tmp_path / "slim.safetensors"


@pytest.mark.parametrize("minimum", [0, 1])
def test_a_slim_model_comes_back_bit_for_bit(make, tmp_path, images, minimum):
    slim, path = make_slim(make, 0.6, minimum=minimum), tmp_path / "slim.safetensors"
    save_pruned(slim, path)
    fresh = make().eval()
    assert load_pruned(fresh, path) is fresh
    assert torch.equal(fresh(images), slim(images))
    found, expected = fresh.state_dict(), slim.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    alone = load_pruned(path)
    assert set(alone) == set(expected)
    assert all(torch.equal(alone[name], expected[name]) for name in expected)


def test_the_record_tells_how_many_units_are_left_of_slimmed_layers(saved):
    slim, path = saved
    record = record_of(path)
    assert (record["format"], record["content"], record["pruned"]) == (2, "dense", {})
    dense = {x.name: x.units for layers in group_units(make_swin()).values() for x in layers}
    left = {x.name: {k: x.units} for k, layers in group_units(slim).items() for x in layers}
    expected = {name: of for name, of in left.items() if dense[name] not in of.values()}
    assert record["operations"] == expected
    assert set(load_file(path)) == set(slim.state_dict())  # any reader of safetensors


def test_a_file_without_slimmed_layers_is_of_format_1(tmp_path):
    model = make_swin()
    global_module_aware_structured(group_units(model), 0.5)  # masked, not removed
    save_pruned(model, tmp_path / "masked.safetensors")
    record = record_of(tmp_path / "masked.safetensors")
    assert record["format"] == 1 and "operations" not in record


def test_a_dense_model_without_masks_is_still_refused(tmp_path):
    with pytest.raises(ValueError, match="must have masks, found no pruned tensor"):
        save_pruned(remove_units(make_swin()), tmp_path / "dense.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_slim_model_are_known_to_be_slim(tmp_path, copied):
    slim = make_slim(make_vit, minimum=0)
    save_pruned(copied(slim), tmp_path / "copy.safetensors")
    save_pruned(slim, tmp_path / "slim.safetensors")
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("copy", "slim")]
    assert files[0] == files[1]


def test_a_loaded_model_is_known_to_be_slim_and_loses_more(saved, tmp_path, images):
    _, path = saved
    model = load_pruned(make_swin(), path).eval()
    global_module_aware_structured(group_units(model), 0.3, multiple=1)
    remove_units(model)
    save_pruned(model, tmp_path / "again.safetensors")
    for start in (make_swin(), load_pruned(make_swin(), path)):  # dense, or slim already
        again = load_pruned(start.eval(), tmp_path / "again.safetensors")
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("masked", [True, False])
def test_masks_on_top_of_a_slim_model_come_back(make, tmp_path, images, masked):
    slim, path = make_slim(make), tmp_path / "sparse.safetensors"
    global_module_aware_unstructured(group_parameters(slim), amount=0.5)
    expected = slim(images)
    save_pruned(slim, path)
    assert record_of(path)["content"] == "compressed" and record_of(path)["operations"]
    fresh = load_pruned(make().eval(), path, masked=masked)
    assert prune.is_pruned(fresh) is masked
    assert torch.equal(fresh(images), expected)
    if masked:
        fresh.train()(images).square().sum().backward()
        assert all(p.grad is not None for p in fresh.parameters())
    state = remove_all(fresh).state_dict()
    alone = load_pruned(path)
    assert all(torch.equal(state[name], alone[name]) for name in state)


def test_masks_alone_go_on_the_slim_model_and_no_other(saved, tmp_path, images):
    slim, path = saved
    sparse = copy.deepcopy(slim)
    global_module_aware_unstructured(group_parameters(sparse), amount=0.5)
    save_pruned(sparse, tmp_path / "masks.safetensors", masks_only=True)
    assert record_of(tmp_path / "masks.safetensors")["format"] == 1
    other = load_pruned(load_pruned(make_swin(), path), tmp_path / "masks.safetensors").eval()
    assert torch.equal(other(images), sparse.eval()(images))
    with pytest.raises(ValueError, match="in one of them only or of another shape"):
        load_pruned(make_swin(), tmp_path / "masks.safetensors")
    with pytest.raises(ValueError, match="must have masks"):
        save_pruned(slim, tmp_path / "none.safetensors", masks_only=True)


def test_save_pruned_refuses_a_slimmed_layer_that_was_changed_since(saved, tmp_path):
    slim, _ = saved
    name = next(name for name, of in record_of(saved[1])["operations"].items() if "neurons" in of)
    mlp = slim.get_submodule(name)
    mlp.fc1, mlp.fc2 = nn.Linear(mlp.fc1.in_features, 7), nn.Linear(7, mlp.fc2.out_features)
    with pytest.raises(ValueError, match=f"{name} must have the .* neurons .* has 7 now"):
        save_pruned(slim, tmp_path / "changed.safetensors")


class OwnMlp(timm.layers.Mlp):
    """A user's own, which no built-in rule knows."""

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def own_block():
    return nn.ModuleDict({"mlp": OwnMlp(8, 32)})


def own_rule(name, module):
    if isinstance(module, OwnMlp):
        parts = (
            Part(module.fc1, "weight", 0, 1, 1),
            Part(module.fc1, "bias", 0, 1, 1),
            Part(module.fc2, "weight", 1, 1, 1),
        )
        units = module.fc1.out_features
        yield UnitLayer(name, "neurons", units, module, parts, (), module.fc2, 1)


def test_units_of_a_rule_of_ones_own_are_saved_and_loaded_with_it(tmp_path):
    model, path = own_block(), tmp_path / "own.safetensors"
    global_module_aware_structured(group_units(model, own_rule), 0.5, multiple=1)
    remove_units(model, own_rule)
    with pytest.raises(ValueError, match="mlp must have the 16 neurons .* pass unit_rule="):
        save_pruned(model, path)
    save_pruned(model, path, unit_rule=own_rule)
    with pytest.raises(ValueError, match="'neurons' removed from 'mlp'.* pass unit_rule="):
        load_pruned(own_block(), path)
    x = torch.randn(2, 8)
    found = load_pruned(own_block(), path, unit_rule=own_rule)
    assert torch.equal(found.mlp(x), model.mlp(x))


def set_operations(path, operations):
    rewrite(path, lambda header, record, data: record.update(operations=operations))


@pytest.mark.parametrize(
    "operations, message",
    [
        ({"layers.9.blocks.0.attn": {"heads": 1}}, "'heads' removed from 'layers.9.blocks.0.attn'"),
        ({"": {"heads": 1}}, "'heads' removed from ''"),
        ({"layers.0.blocks.0.attn": {"neurons": 1}}, "'neurons' removed from 'layers.0.blocks"),
        ({"layers.0.blocks.0.attn": {"conv5": 1}}, "'conv5' removed from 'layers.0.blocks.0.attn'"),
        ({"layers.0.blocks.0.attn": {"heads": 3}}, "3 heads of .* between 0 and 2"),
        ({"layers.0.blocks.0.attn": {"heads": 10**30}}, "between 0 and 2"),
        ({"layers.0.blocks.0.attn": {"heads": 0}}, "in one of them only or of another shape"),
        ({"layers.0.blocks.0.attn": {"heads": -1}}, "number that is not negative"),
        ({"layers.0.blocks.0.attn": {"heads": 1.0}}, "number that is not negative"),
        ({"layers.0.blocks.0.attn": {"heads": True}}, "number that is not negative"),
        ({"layers.0.blocks.0.attn": {"heads": "1"}}, "number that is not negative"),
        ({"layers.0.blocks.0.attn": {}}, "number that is not negative"),
        ({"layers.0.blocks.0.attn": 1}, "number that is not negative"),
        ({}, "number that is not negative"),
        ([], "found other fields"),
        (None, "found other fields"),
    ],
)
def test_operations_made_by_hand_are_refused(saved, operations, message):
    path, model = saved[1], make_swin()
    before = state_of(model)
    set_operations(path, operations)
    with pytest.raises(ValueError, match=message):
        load_pruned(model, path)
    assert_untouched(model, before)


def test_a_layer_told_twice_is_refused(saved):
    path, model = saved[1], make_swin()
    header, data = parts(path)
    text = header["__metadata__"]["torch_dimap"]
    name = next(iter(json.loads(text)["operations"]))
    header["__metadata__"]["torch_dimap"] = text.replace(
        f'"operations":{{"{name}"', f'"operations":{{"{name}":{{"heads":1}},"{name}"'
    )
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ValueError, match="a key occurs twice"):
        load_pruned(model, path)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_number_of_units_that_the_tensors_do_not_have_is_refused(saved, change):
    path, model = saved[1], make_swin()
    before, operations = state_of(model), record_of(path)["operations"]
    name = next(name for name, of in operations.items() if "neurons" in of)
    operations[name]["neurons"] += change
    set_operations(path, operations)
    with pytest.raises(ValueError, match=f"{re.escape(name)}.fc1.weight.* of another shape"):
        load_pruned(model, path)
    assert_untouched(model, before)


def test_a_slim_file_is_refused_by_a_model_that_is_slimmer(saved, tmp_path):
    model = make_slim(make_swin, 0.8, minimum=0)
    before = state_of(model)
    with pytest.raises(ValueError, match="tells of .heads. removed|stay, which must be"):
        load_pruned(model, saved[1])
    assert_untouched(model, before)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_operations_are_loaded_or_refused(saved, data):
    path, model = saved[1], make_swin()
    intact, record = path.read_bytes(), record_of(path)
    names = st.sampled_from([*record["operations"], "layers", "head", "x"]) | st.text(max_size=3)
    kinds = st.sampled_from(["heads", "neurons", "skip"])
    numbers = st.integers(-1, 70) | st.none() | st.floats() | st.integers()
    drawn = st.dictionaries(names, st.dictionaries(kinds, numbers, max_size=2), max_size=3)
    operations = {**record["operations"], **data.draw(drawn)}
    before = state_of(model)
    try:
        set_operations(path, operations)
        load_pruned(model, path)
    except ValueError:
        assert_untouched(model, before)
    else:
        left = {k: v for k, v in operations.items() if record["operations"].get(k) != v}
        # What more was told is what the layer had anyway.
        assert all(dict(of) in ({"heads": 2}, {"heads": 4}, {"neurons": 64}, {"neurons": 128})
                   for of in left.values())  # fmt: skip
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize("broken", ["_put", "attach", "cut_units"])
def test_load_pruned_puts_a_model_back_that_it_cannot_fill(tmp_path, monkeypatch, broken):
    slim, path = make_slim(make_swin, 0.7, minimum=0), tmp_path / "slim.safetensors"
    global_module_aware_unstructured(group_parameters(slim), amount=0.5)
    save_pruned(slim, path)
    model = make_swin()
    before = state_of(model)
    works = getattr(torch_dimap.files.loading, broken)

    def fails(*arguments):
        if broken == "_put":  # the first tensor, once the units are cut out
            raise MemoryError
        works(*arguments)
        if broken == "cut_units" or arguments[0].label.startswith("layers.1"):
            raise MemoryError

    monkeypatch.setattr(torch_dimap.files.loading, broken, fails)
    with pytest.raises(MemoryError):
        load_pruned(model, path, masked=True)
    monkeypatch.undo()
    found, numbers = state_of(model)
    assert numbers == before[1] and list(found) == list(before[0])
    assert all(found[name][0] is tensor for name, (tensor, _) in before[0].items())
    load_pruned(model, path, masked=True)


@pytest.mark.parametrize("compressed", [True, False])
def test_prune_and_expand_checkpoint_keep_the_record_of_removed_units(
    saved, tmp_path, images, compressed
):
    slim, path = saved
    target, whole = tmp_path / "sparse.safetensors", tmp_path / "whole.safetensors"
    prune_checkpoint(path, target, 0.5, compressed=compressed)
    if compressed:
        expand_checkpoint(target, whole)
    global_module_aware_unstructured(group_parameters(slim), amount=0.5)
    for file in (target, whole) if compressed else (target,):
        assert record_of(file)["operations"] == record_of(path)["operations"]
        fresh = load_pruned(make_swin().eval(), file)
        assert torch.equal(fresh(images), slim(images))


def test_expand_checkpoint_says_that_a_slim_file_without_masks_is_whole(saved, tmp_path):
    with pytest.raises(ValueError, match="it can be used as it is"):
        expand_checkpoint(saved[1], tmp_path / "whole.safetensors")


def test_inspect_checkpoint_tells_how_many_units_are_left(saved):
    text, operations = inspect_checkpoint(saved[1]), record_of(saved[1])["operations"]
    left = [of["neurons"] for of in operations.values() if "neurons" in of]
    assert (
        f"slim: {sum(left)} neurons are left in {len(left)} layers, {min(left)} to {max(left)} "
        "in each"
    ) in text.splitlines()
