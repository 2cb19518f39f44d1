"""SPViT's gates: what they compute, what moves them, what they end in."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import torch_dimap
from torch_dimap import learning
from torch_dimap.learning import SinglePathSearch
from torch_dimap.learning.single_path_attention import (
    damped,
    decided_gates,
    nested,
    sample_gates,
)

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4,
        "num_classes": 5}  # fmt: skip
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
OPEN = {"skip": 0, "conv1": 1, "conv3": 2, "attention": 3}


def small_vit(**more):
    return timm.create_model("vit_tiny_patch16_224", **{**SIZE, **more})


def small_swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=4, window_size=4, embed_dim=24,
        depths=(2, 2), num_heads=(2, 4), num_classes=5, drop_path_rate=0.0,
    )  # fmt: skip


BUILDS = {"vit": small_vit, "swin": small_swin}


def decide(search, operations, every=2):
    """Set gates by hand: the operations block by block, and of the neurons every so many."""
    model = search.model
    with torch.no_grad():
        for name, operation in operations.items():
            logits = model.get_submodule(name).gate_logits
            logits.copy_(torch.where(torch.arange(3) < OPEN[operation], 1.0, -1.0))
        for name, parameter in model.named_parameters():
            if name.endswith("fc2.gate_logits"):
                parameter.copy_(torch.where(torch.arange(len(parameter)) % every == 0, 1.0, -1.0))
            if name.endswith((".attn.logits", "norms.conv3.weight", "norms.conv1.bias")):
                parameter.normal_()


def names_of(model):
    return [name for name, module in model.named_modules() if name.endswith(".attn")]


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_open_gates_leave_the_outputs_as_they_were(build):
    model = build().eval()
    dense = model(IMAGES)
    search = SinglePathSearch(model, 0.6, steps=9)
    assert torch.equal(model(IMAGES), dense)
    with torch.no_grad():
        for gate in search.gates():
            gate.fill_(100.0)
    model.train()
    torch.testing.assert_close(model(IMAGES), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("operation", OPEN)
def test_search_finished_and_collapsed_models_agree(build, operation):
    model = build().eval()
    search = SinglePathSearch(model, 0.6, steps=9)
    names = names_of(model)
    decide(search, {names[0]: operation, names[1]: "conv3" if operation == "skip" else operation})
    searched = model(IMAGES)
    choices = search.finish()
    assert list(choices.operations.values())[0] == operation
    torch.testing.assert_close(model(IMAGES), searched, atol=1e-5, rtol=1e-5)
    torch_dimap.remove_units(model)
    learning.collapse_convolutions(model)
    torch.testing.assert_close(model(IMAGES), searched, atol=1e-5, rtol=1e-5)
    assert not any("gate" in name or "logits" in name for name in model.state_dict())


def test_removal_leaves_no_trace():
    for build in BUILDS.values():
        model = build().eval()
        kinds, names = [type(m) for m in model.modules()], list(model.state_dict())
        dense = model(IMAGES)
        SinglePathSearch(model, 0.6, steps=9).remove()
        assert [type(m) for m in model.modules()] == kinds
        assert list(model.state_dict()) == names
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert torch.equal(model(IMAGES), dense)


def test_the_cost_pushes_only_gates_that_it_depends_on():
    logits = torch.ones(3, requires_grad=True)
    nested(decided_gates(logits)).sum().backward()
    assert (logits.grad / logits.grad[2]).tolist() == pytest.approx([3.0, 2.0, 1.0])
    logits = torch.tensor([1.0, -1.0, 1.0], requires_grad=True)  # a 1x1 convolution
    nested(decided_gates(logits)).sum().backward()
    assert (logits.grad != 0).tolist() == [True, True, False]


@pytest.mark.parametrize("gates, reached", [
    ([1.0, 1.0, 1.0], [False, False, True]),
    ([1.0, 1.0, 0.0], [False, True, True]),
    ([1.0, 0.0, 0.0], [True, True, True]),
])  # fmt: skip
def test_damping_keeps_the_task_from_idle_gates(gates, reached):
    elements = torch.tensor(gates, requires_grad=True)
    for gate, expected in zip(damped(elements), reached):
        assert gate.requires_grad
        found = torch.autograd.grad(gate, elements, retain_graph=True)[0]
        assert bool(found.any()) == expected


def test_gates_open_above_one_half():
    logits = torch.tensor([1e-6, 0.0, -1e-6])
    assert decided_gates(logits).tolist() == [1.0, 0.0, 0.0]


def test_gates_are_drawn_with_their_probabilities():
    torch.manual_seed(0)
    drawn = sample_gates(torch.full((20000,), 1.5))
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(0.818, abs=0.01)


def test_share_is_the_cost_of_the_decision():
    model = small_vit()
    search = SinglePathSearch(model, 0.6, steps=9)
    decide(search, dict(zip(names_of(model), ["conv1", "skip", "attention"])), every=3)
    dense = small_vit()
    flops = learning.single_path_flops(dense, ["conv1", "skip", "attention"], [32] * 3)
    whole = learning.single_path_flops(dense, ["attention"] * 3, [96] * 3)
    choices = search.choices()
    assert choices.flops == flops
    assert float(search.share().detach()) == pytest.approx(flops / whole) == choices.share
    search.penalty().backward()
    assert all(gate.grad is not None for gate in search.gates())
    assert all(weight.grad is None for weight in search.weights())


def train(search, steps, weight_lr=5e-4, gate_lr=3e-2):
    model = search.model
    optimizer = torch.optim.AdamW([
        {"params": search.weights(), "lr": weight_lr, "weight_decay": 0.0},
        {"params": search.gates(), "lr": gate_lr, "weight_decay": 0.0},
    ])  # fmt: skip
    labels = torch.tensor([0, 1, 2])
    model.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(IMAGES), labels) + search.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        search.update()
    return optimizer


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_training_comes_down_to_the_target(build):
    torch.manual_seed(0)
    search = SinglePathSearch(build(), 0.7, steps=200)
    train(search, 200)
    found = search.choices()
    assert found.share == pytest.approx(0.7, abs=0.02)
    kept = sum(int(keep.sum()) for keep in found.neurons.values())
    assert 0 < kept < sum(len(keep) for keep in found.neurons.values())


def test_a_fixed_weight_pulls_and_does_not_hold_and_never_says_it_is_done():
    torch.manual_seed(0)
    search = SinglePathSearch(small_vit(), 0.5, steps=20, weight=1e-9)
    train(search, 60, gate_lr=1e-3)
    assert search.choices().share > 0.9
    assert not search.stands_still()


def test_an_interrupted_search_goes_on_to_the_same_weights():
    torch.manual_seed(0)
    whole = SinglePathSearch(small_vit(), 0.6, steps=9)
    first = copy.deepcopy(whole.model.state_dict())
    optimizer = train(whole, 3)
    saved = pickle.dumps((whole.model.state_dict(), whole.state_dict(), torch.get_rng_state()))
    del optimizer
    train(whole, 3)
    again = SinglePathSearch(small_vit(), 0.6, steps=9)
    assert again.model.state_dict().keys() == first.keys()
    state, held, random = pickle.loads(saved)
    again.model.load_state_dict(state)
    again.load_state_dict(held)
    torch.set_rng_state(random)
    train(again, 3)
    pairs = zip(whole.model.state_dict().values(), again.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_copies_of_a_searched_model_have_gates_of_their_own():
    model = small_vit()
    search = SinglePathSearch(model, 0.6, steps=9)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model))).eval()
    before = twin(IMAGES)
    with torch.no_grad():
        for gate in search.gates():
            gate.fill_(-1.0)
    assert torch.equal(twin(IMAGES), before)
    assert not torch.equal(model.eval()(IMAGES), before)


def test_choices_fit_a_fresh_model_and_no_other():
    search = SinglePathSearch(small_vit(), 0.6, steps=9)
    decide(search, {"blocks.1.attn": "conv3"})
    choices = search.finish()
    fresh = learning.apply_single_path(small_vit(), choices)
    assert fresh.blocks[1].attn.operation == "conv3"
    assert torch_dimap.remove_units(fresh).blocks[0].mlp.fc1.out_features == 48
    other = small_vit(mlp_ratio=2)
    before = list(other.state_dict())
    with pytest.raises(ValueError, match="blocks.0.mlp"):
        learning.apply_single_path(other, choices)
    assert list(other.state_dict()) == before


@pytest.mark.parametrize("more, error", [
    ({"target": 0.01}, r"target must be at least 0\.\d+, which is left when all"),
    ({"weight": -1.0}, "weight must be greater than 0"),
    ({"temperature": 0.0}, "temperature must be greater than 0"),
    ({"initial": -1.5}, "initial must be greater than 0"),
    ({"weight": float("inf")}, "weight must be greater than 0 and finite"),
    ({"steps": 0}, "steps must be an int of 1 or more"),
])  # fmt: skip
def test_settings_out_of_range_are_refused_and_leave_the_model(more, error):
    model = small_vit()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=error):
        SinglePathSearch(model, **{"target": 0.6, "steps": 9, **more})
    assert list(model.state_dict()) == names


def test_a_search_that_has_ended_says_so():
    search = SinglePathSearch(small_vit(), 0.6, steps=9)
    search.finish()
    for call in (search.choices, search.finish, search.penalty, search.update):
        with pytest.raises(RuntimeError, match="has ended it"):
            call()
    assert search.remove() is search.model


def test_gates_that_have_diverged_decide_nothing():
    model = small_vit()
    search = SinglePathSearch(model, 0.6, steps=9)
    names = list(model.state_dict())
    search.gates()[1].data[3] = float("nan")
    for call in (search.choices, search.finish, search.update):
        with pytest.raises(ValueError, match="numbers to decide by, found NaN: .* has diverged"):
            call()
    assert search.done == 0 and list(model.state_dict()) == names


def test_a_search_compiles_trains_in_bfloat16_and_with_checkpoints():
    torch.manual_seed(0)
    model = small_vit()
    model.set_grad_checkpointing()
    search = SinglePathSearch(model, 0.6, steps=9)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(compiled(IMAGES).float(), torch.tensor([0, 1, 2]))
    (loss + search.penalty()).backward()
    assert all(gate.grad is not None and gate.grad.isfinite().all() for gate in search.gates())


def test_a_finish_that_fails_leaves_the_search_going():
    for build in BUILDS.values():
        search = SinglePathSearch(build(), 0.6, steps=9)
        names = list(search.model.state_dict())
        with pytest.raises(ValueError, match="skip must be one of"):
            search.finish(skip="no")
        assert list(search.model.state_dict()) == names
        train(search, 1)
        assert search.finish()
        assert not any("gate" in name for name in search.model.state_dict())


def test_masked_neurons_are_refused():
    model = small_vit()
    units = torch_dimap.group_units(model)
    torch_dimap.global_module_aware_structured({"neurons": units["neurons"]}, 0.5)
    with pytest.raises(RuntimeError, match="MLPs must have no masks, found some in blocks.0.mlp"):
        SinglePathSearch(model, 0.6, steps=9)
    assert SinglePathSearch(torch_dimap.remove_units(model), 0.6, steps=9)


def test_units_removed_in_a_search_are_told_of():
    model = small_vit()
    search = SinglePathSearch(model, 0.6, steps=9)
    units = torch_dimap.group_units(model)
    torch_dimap.global_module_aware_structured({"neurons": units["neurons"]}, 0.5)
    torch_dimap.remove_units(model)
    with pytest.raises(RuntimeError, match="expected the 96 neurons .* found"):
        model(IMAGES)
    search.remove()
    assert model(IMAGES).isfinite().all()


def test_what_is_no_state_and_no_choice_is_refused():
    search = SinglePathSearch(small_vit(), 0.6, steps=9)
    with pytest.raises(ValueError, match="must hold target, steps, weight, done and held, found"):
        search.load_state_dict({})
    other = SinglePathSearch(small_vit(), 0.6, steps=10).state_dict()
    with pytest.raises(ValueError, match="of the same settings.*found steps=10"):
        search.load_state_dict(other)
    with pytest.raises(TypeError, match="choices must be a SinglePath"):
        learning.apply_single_path(small_vit(), None)
    with pytest.raises(TypeError, match="a tensor of flags for each MLP, found others for a"):
        learning.apply_single_path(small_vit(), learning.SinglePath({}, {"a": [1]}, 0, 0.0))


def test_a_second_search_in_the_same_model_is_refused():
    model = small_vit()
    SinglePathSearch(model, 0.6, steps=9)
    with pytest.raises(ValueError, match="searched already"):
        SinglePathSearch(model, 0.6, steps=9)
