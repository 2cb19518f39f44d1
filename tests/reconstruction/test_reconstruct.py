"""What reconstruct() promises, on small models."""

from __future__ import annotations

import copy

import pytest
import torch
from backbones import FAMILIES, build, images, outputs
from conftest import make_swin
from torch import nn
from torch.nn.utils import prune

import torch_dimap
from torch_dimap import global_module_aware_unstructured, group_parameters, reconstruct

BOTH = pytest.mark.parametrize("sequential", [True, False])


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 1, 16, 16, generator=generator) for _ in range(3)]


def pruned(model, amount=0.5):
    global_module_aware_unstructured(group_parameters(model), amount=amount)
    return model


def distance(model, dense, batches):
    """Return how far the outputs lie from the dense model's, as a part of their norm."""
    model.eval(), dense.eval()
    with torch.no_grad():
        off = [torch.stack([(model(x) - dense(x)).norm(), dense(x).norm()]) for x in batches]
    return float(sum(off)[0] / sum(off)[1])


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


class Mlp(nn.Module):
    """Two layers with an activation that lets everything be worked out by hand."""

    def __init__(self, inputs=6, hidden=8, outputs=5):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def least_squares(layer, x, target, damping=0.01):
    """Refit one linear layer row by row, by the textbook."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    price = damping * (1 + (x.shape[1] - 1) / len(x))
    ridge = price * (x[:, :-1] ** 2).sum(0).mean() * torch.eye(x.shape[1]).double()
    ridge[-1, -1] = 0.0
    weight, bias = layer.weight_orig.detach().clone(), layer.bias.detach().clone()
    for row, mask in enumerate(layer.weight_mask):
        kept = torch.cat([mask, torch.ones(1, dtype=torch.bool)])
        old = torch.cat([weight[row], bias[row, None]]).double()
        a = (x[:, kept].t() @ x[:, kept]) + ridge[kept][:, kept]
        b = x[:, kept].t() @ target[:, row].double() + ridge[kept][:, kept] @ old[kept]
        new = torch.linalg.solve(a, b).float()
        weight[row, mask], bias[row] = new[:-1], new[-1]
    return weight, bias


@BOTH
def test_reconstruct_solves_the_least_squares_problem_of_each_layer(sequential):
    model, x = Mlp(), torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    dense = copy.deepcopy(model)
    for layer in model.fc1, model.fc2:
        torch_dimap.dimap_unstructured(layer, "weight", amount=0.4)
    hidden = dense.fc1(x).relu().detach()
    weight1, bias1 = least_squares(model.fc1, x, dense.fc1(x).detach())
    seen = hidden
    if sequential:
        seen = (x @ (weight1 * model.fc1.weight_mask).t() + bias1).relu()
    weight2, bias2 = least_squares(model.fc2, seen, dense.fc2(hidden).detach())
    reconstruct(model, x.split(20), sequential=sequential)
    for layer, weight, bias in (model.fc1, weight1, bias1), (model.fc2, weight2, bias2):
        torch.testing.assert_close(layer.weight_orig.detach(), weight, atol=2e-4, rtol=2e-3)
        torch.testing.assert_close(layer.bias.detach(), bias, atol=2e-4, rtol=2e-3)
        torch.testing.assert_close(layer.weight, layer.weight_orig * layer.weight_mask)


@BOTH
def test_reconstruct_brings_a_swin_back_to_its_dense_outputs(swin, batches, sequential):
    dense = copy.deepcopy(swin)
    before = distance(pruned(swin), dense, batches)
    misfits = reconstruct(swin, batches, sequential=sequential)
    assert distance(swin, dense, batches) < 0.3 * before
    assert all(misfit.after < misfit.before for misfit in misfits.values())
    assert list(misfits)[:2] == ["layers.0.blocks.0.attn.qkv.weight",
                                 "layers.0.blocks.0.attn.proj.weight"]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruct_reaches_all_layers_of_every_family(family, one_thread):
    model, x = pruned(build(family).eval()), images(family, 4)
    misfits = reconstruct(model, x.split(2))
    assert len(misfits) == sum(1 for _ in model.named_buffers() if _[0].endswith("weight_mask"))
    assert all(misfit.after <= misfit.before for misfit in misfits.values())
    assert torch.isfinite(outputs(model, x)).all() or family in ("hiera", "torchvision vit")


def test_reconstruct_changes_kept_weights_and_biases_only(swin, batches):
    before = state(pruned(swin))
    reconstruct(swin, batches)
    refitted = {f"{n}.weight_orig" for n, m in swin.named_modules() if hasattr(m, "weight_mask")}
    for key, value in swin.state_dict().items():
        if key in refitted:
            mask = swin.state_dict()[key.replace("_orig", "_mask")]
            assert torch.equal(value[~mask], before[key][~mask])
            assert not torch.equal(value[mask], before[key][mask])
        elif key.replace(".bias", ".weight_orig") not in refitted:
            assert torch.equal(value, before[key]), key


@BOTH
def test_reconstruct_with_nothing_pruned_changes_nothing(swin, batches, sequential):
    before = state(pruned(swin, 0.0))
    misfits = reconstruct(swin, batches, sequential=sequential)
    assert all(torch.equal(value, before[key]) for key, value in swin.state_dict().items())
    assert set(misfits.values()) == {(0.0, 0.0)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reconstruct_serves_half_precision(dtype, batches):
    model = pruned(make_swin().to(dtype))
    misfits = reconstruct(model, [x.to(dtype) for x in batches])
    assert all(misfit.after < misfit.before for misfit in misfits.values())
    assert {p.dtype for p in model.parameters()} == {dtype}
    single = pruned(make_swin())
    for key, value in single.state_dict().items():  # the same weights and masks in float32
        value.copy_(pruned(make_swin().to(dtype)).state_dict()[key])
    reference = reconstruct(single, batches)
    mean = [sum(misfit.after for misfit in x.values()) for x in (misfits, reference)]
    assert mean[0] == pytest.approx(mean[1], rel=0.1)


def test_reconstruct_leaves_masked_rows_and_masked_biases_alone(batches):
    model = Mlp()
    x = torch.randn(50, 6)
    for module, name, dim in (model.fc1, "weight", 0), (model.fc2, "weight", 1):
        mask = torch.ones_like(getattr(module, name))
        mask.select(dim, 2).zero_(), mask.select(dim, 5).zero_()
        prune.custom_from_mask(module, name, mask)
    prune.custom_from_mask(model.fc1, "bias", model.fc1.weight_mask[:, 0].clone())
    bias = model.fc1.bias_orig.detach().clone()
    misfits = reconstruct(model, [x])
    assert misfits["fc2.weight"].after < misfits["fc2.weight"].before
    assert torch.equal(model.fc1.bias_orig[[2, 5]], bias[[2, 5]])
    assert not model.fc1.bias[[2, 5]].any() and not model.fc1.weight[[2, 5]].any()
    assert not model.fc2.weight[:, [2, 5]].any()
    hidden = model.fc1(x).relu()
    assert not hidden[:, [2, 5]].any()


def test_reconstruct_takes_what_loaders_give(batches):
    results = []
    for form in (
        lambda x: x,
        lambda x: (x, torch.zeros(len(x), dtype=torch.long)),
        lambda x: [x],
        lambda x: {"x": x, "labels": torch.zeros(len(x))},
    ):
        model = pruned(make_swin())
        reconstruct(model, (form(x) for x in batches))
        results.append(state(model))
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


def test_reconstruct_does_not_depend_on_how_images_are_batched(batches):
    models = [pruned(make_swin()) for _ in range(2)]
    reconstruct(models[0], batches)
    reconstruct(models[1], torch.cat(batches).split(5))
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_reconstruct_leaves_mode_hooks_buffers_and_random_numbers(swin, batches):
    pruned(swin).train()
    swin.layers[0].eval()
    modes = [module.training for module in swin.modules()]
    hooks = [list(module._forward_pre_hooks) for module in swin.modules()]
    names = [set(vars(module)) for module in swin.modules()]
    parameters = [id(p) for p in swin.parameters()]
    buffers = {key: value.clone() for key, value in swin.named_buffers()}
    generator = torch.get_rng_state()
    reconstruct(swin, batches)
    assert [module.training for module in swin.modules()] == modes
    assert [list(module._forward_pre_hooks) for module in swin.modules()] == hooks
    assert [set(vars(module)) for module in swin.modules()] == names
    assert [id(p) for p in swin.parameters()] == parameters
    assert all(torch.equal(value, buffers[key]) for key, value in swin.named_buffers())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None and p.requires_grad for p in swin.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_reconstruct_leaves_the_model_as_it_was_when_stopped(swin, batches, error):
    before = state(pruned(swin))
    calls = 0

    def stop(module, args):
        nonlocal calls
        calls += 1
        if calls > 3:
            raise error

    handle = swin.layers[1].blocks[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(error):
        reconstruct(swin, batches)
    handle.remove()
    assert all(torch.equal(value, before[key]) for key, value in swin.state_dict().items())
    assert "forward" not in vars(swin.layers[0].blocks[0])
    torch_dimap.remove_all(swin)(batches[0]).sum().backward()


def test_reconstruct_refits_the_named_groups_only(swin, batches):
    groups = group_parameters(pruned(swin))
    misfits = reconstruct(swin, batches, groups={"proj": groups["proj"]})
    assert all(name.endswith("proj.weight") for name in misfits) and len(misfits) == 4


def test_reconstruct_serves_a_compiled_model(swin, batches):
    other = copy.deepcopy(pruned(swin))
    reconstruct(torch.compile(swin), batches)
    reconstruct(other, batches)
    for a, b in zip(swin.parameters(), other.parameters()):
        torch.testing.assert_close(a, b)


def test_reconstruct_trains_on(swin, batches):
    reconstruct(pruned(swin), batches)
    optimizer = torch.optim.SGD(swin.parameters(), lr=0.1)
    swin(batches[0]).sum().backward()
    optimizer.step()
    swin(batches[0]).sum().backward()


@pytest.mark.parametrize(
    "batches, error, message",
    [
        ([], ValueError, "batches is empty"),
        ([torch.full((2, 1, 16, 16), torch.nan)], ValueError, r"batches\[0\] holds NaN"),
        (torch.zeros(2, 1, 16, 16), TypeError, r"give \[batch\]"),
        ([3.0], TypeError, "must be a tensor, a tuple or a dict"),
    ],
)
def test_reconstruct_refuses_batches(swin, batches, error, message):
    before = state(pruned(swin))
    with pytest.raises(error, match=message):
        reconstruct(swin, batches)
    assert all(torch.equal(value, before[key]) for key, value in swin.state_dict().items())


def test_reconstruct_refuses_inputs_that_overflow_on_the_way(swin, batches):
    pruned(swin)
    with torch.no_grad():
        swin.patch_embed.norm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="layers.0.blocks.0.attn.qkv.weight must be finite"):
        reconstruct(swin, batches)


@pytest.mark.parametrize("damping, error", [(0.0, ValueError), (-1, ValueError), ("a", TypeError)])
def test_reconstruct_refuses_a_damping(swin, batches, damping, error):
    with pytest.raises(error, match="damping must be"):
        reconstruct(pruned(swin), batches, damping=damping)


def test_reconstruct_refuses_a_model_without_masks(swin, batches):
    with pytest.raises(ValueError, match="model must hold masked weights, found none: prune first"):
        reconstruct(swin, batches)
    with pytest.raises(ValueError, match="groups must hold masked weights"):
        reconstruct(pruned(swin), batches, groups={})


def test_reconstruct_names_the_group_that_is_wrong(swin, batches):
    with pytest.raises(TypeError, match=r"groups\['mine'\]\[0\] must be a \(module, name\) pair"):
        reconstruct(pruned(swin), batches, groups={"mine": ["qkv"]})
    with pytest.raises(ValueError, match=r"groups\[0\] lists a Linear that is no part of"):
        reconstruct(pruned(swin), batches, groups=[(nn.Linear(2, 2), "weight")])


def test_reconstruct_refuses_a_kernel_that_is_no_matrix(batches):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(1))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match="found another product with 0.weight: leave them out"):
        reconstruct(model, batches)
