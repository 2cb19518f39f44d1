"""Class masks: exact at one, each image by its own class, and gone without a trace."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import make_swin, make_vit
from torch import nn

import torch_dimap
from torch_dimap.learning import ClassMasks, gated
from torch_dimap.learning.penalties import PENALTIES

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = pytest.mark.parametrize("make", [make_vit, make_swin])
LABELS = torch.tensor([3, 1, 4, 1])


def all_layers(model):
    return [layer for layers in torch_dimap.group_units(model).values() for layer in layers]


def random_masks(model, classes=10, **more):
    masks = ClassMasks(model, torch_dimap.group_units(model), classes, **more)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for mask in masks.parameters():
            mask.copy_(torch.rand(mask.shape, generator=generator) * 2)
    return masks


def trace(model):
    """What a call must leave as it was."""
    return (
        [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()],
        [id(m) for m in model.modules()],
    )


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_one_leave_the_logits_to_the_last_bit(make, dtype, images):
    model = make().eval()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        before = model(images)
        with ClassMasks(model, torch_dimap.group_units(model), 10) as masks:
            with masks.labels(LABELS):
                assert torch.equal(model(images), before)


@MODELS
def test_each_image_is_masked_by_its_own_class(make, images):
    model = make().eval()
    with random_masks(model) as masks, masks.labels(LABELS):
        together = model(images)
    for i, label in enumerate(LABELS):
        row = {x: mask.detach()[label].clone for x, mask in zip(masks.layers, masks.masks)}
        with gated(row):
            alone = model(images[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["coatnet_0_rw_224", "nest_tiny", "swinv2_tiny_window8_256"])
def test_no_image_is_touched_by_the_label_of_another(name):
    small = {"coatnet_0_rw_224": {"depths": (1, 1, 1, 1), "embed_dim": (16, 32, 32, 64)},
             "swinv2_tiny_window8_256": {"depths": (2, 1), "embed_dim": 32, "num_heads": (2, 4),
                                         "window_size": 4}}.get(name, {})  # fmt: skip
    model = timm.create_model(name, img_size=64, num_classes=10, **small).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # SwinV2's norms begin at zero: nothing would come through
            nn.init.ones_(parameter)
    pair = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), random_masks(model) as masks:
        with masks.labels(torch.tensor([1, 2])):
            one = model(pair)
        with masks.labels(torch.tensor([1, 7])):
            other = model(pair)
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


@MODELS
def test_soft_labels_take_the_mixture_of_rows(make, images):
    model = make().eval()
    shares = torch.zeros(4, 10)
    shares[:, 2], shares[:, 7] = 0.3, 0.7
    with random_masks(model) as masks, masks.labels(shares):
        mixed = model(images)
    rows = {x: (0.3 * m[2] + 0.7 * m[7]).detach().clone for x, m in zip(masks.layers, masks.masks)}
    with gated(rows):
        torch.testing.assert_close(model(images), mixed, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_of_any_integer_type(dtype, swin, images):
    with random_masks(swin.eval()) as masks:
        with masks.labels(LABELS):
            expected = swin(images)
        with masks.labels(LABELS.to(dtype)):
            assert torch.equal(swin(images), expected)


def test_one_hot_labels_are_hard_labels(swin, images):
    with random_masks(swin.eval()) as masks:
        with masks.labels(LABELS):
            hard = swin(images)
        with masks.labels(F.one_hot(LABELS, 10).float()):
            torch.testing.assert_close(swin(images), hard, rtol=0, atol=2e-6)


@MODELS
def test_masked_baked_and_removed_agree(make, images):
    """T1 of the method: hooks, torch's masks, zeros in the weights, and smaller tensors."""
    model = make().eval()
    masks = random_masks(model)
    scores = masks.scores()
    masks.remove()
    torch_dimap.global_module_aware_structured(
        torch_dimap.group_units(model), 0.5, importance_scores=scores, multiple=1
    )
    keeps = {x: x.unmasked() for x in masks.layers}
    assert any(not keep.all() for keep in keeps.values())
    with torch.no_grad():
        masked = model(images)
    baked = torch_dimap.remove_all(copy.deepcopy(model))(images)
    removed = torch_dimap.remove_units(copy.deepcopy(model))(images)
    dense = make().eval()
    dense.load_state_dict(make().state_dict())
    with gated({x: keep.float for x, keep in zip(all_layers(dense), keeps.values())}):
        hooks = dense(images)
    for other in (baked, removed, hooks):
        torch.testing.assert_close(other, masked, rtol=0, atol=2e-6)


@MODELS
def test_gradients_reach_the_rows_of_the_labels_alone(make, images):
    model = make().eval()
    with random_masks(model) as masks, masks.labels(LABELS):
        F.cross_entropy(model(images), LABELS).backward()
    for mask in masks.parameters():
        assert mask.grad[[1, 3, 4]].abs().sum(1).min() > 0
        assert mask.grad[[0, 2, 5, 6, 7, 8, 9]].abs().max() == 0
    assert all(p.grad is None for p in model.parameters())


def test_freeze_off_trains_the_model_along(swin, images):
    with random_masks(swin.eval(), freeze=False) as masks, masks.labels(LABELS):
        F.cross_entropy(swin(images), LABELS).backward()
    assert all(p.grad is not None for p in swin.parameters())


@MODELS
def test_checkpointing_gives_the_same_gradients(make, images):
    model = make().eval()
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        with random_masks(model) as masks, masks.labels(LABELS):
            F.cross_entropy(model(images), LABELS).backward()
        found.append([mask.grad for mask in masks.parameters()])
    torch.testing.assert_close(*found)


def test_checkpointing_with_the_backward_outside_says_so(images):
    model = make_vit().train()
    model.set_grad_checkpointing()
    with random_masks(model) as masks:
        with masks.labels(LABELS):
            loss = F.cross_entropy(model(images), LABELS)
        with pytest.raises(RuntimeError, match="backward too where activations are checkpointed"):
            loss.backward()


@MODELS
def test_fused_and_open_attention_agree(make, images):
    model = make().eval()
    found = []
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        with random_masks(model) as masks, masks.labels(LABELS):
            found.append(model(images))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_autocast_leaves_the_gradients_in_float32(swin, images):
    with random_masks(swin.eval()) as masks:
        with masks.labels(LABELS), torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(swin(images).float(), LABELS)
        loss.backward()
    assert all(mask.grad.dtype == torch.float32 and mask.grad.any() for mask in masks.parameters())


@MODELS
def test_remove_leaves_no_trace(make, images):
    model = make().eval()
    next(model.parameters()).requires_grad_(False)  # was frozen before, and stays so
    before, state = trace(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        with random_masks(model) as masks, masks.labels(LABELS):
            F.cross_entropy(model(images), LABELS).backward()
            raise ZeroDivisionError
    assert trace(model) == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    masks.remove()  # once more does no harm
    with pytest.raises(RuntimeError, match="the masks are removed from the model"):
        with masks.labels(LABELS):
            pass


def test_readers_that_a_forward_passes_by_are_refused(swin, images):
    """A class that may call its layer, and does not, is found out when it runs."""
    last = torch_dimap.group_units(swin)["neurons"][-1]
    mlp, fc2 = last.module, last.reader

    class Passing(type(mlp)):
        def forward(self, x):
            hidden = self.act(self.fc1(x))
            return self.fc2(hidden) if hidden is None else F.linear(hidden, fc2.weight, fc2.bias)

    masks = ClassMasks(swin.eval(), torch_dimap.group_units(swin), 10)
    mlp.__class__ = Passing
    with pytest.raises(RuntimeError, match=r"passes by the readers of layers.1.blocks.1.mlp"):
        with masks.labels(LABELS):
            swin(images)


def test_a_refused_model_is_left_as_it_was(swin):
    other = make_vit()
    before = trace(swin)
    with pytest.raises(ValueError, match="found blocks.0.attn, blocks.1.attn, blocks.2.attn and"):
        ClassMasks(swin, torch_dimap.group_units(other), 10)
    assert trace(swin) == before
    torch.manual_seed(0)
    bypassing = torchvision.models.vit_b_16(num_classes=10)
    before = trace(bypassing)
    with pytest.raises(ValueError, match="ClassMasks.*no hook runs there"):
        ClassMasks(bypassing, torch_dimap.group_units(bypassing), 10)
    assert trace(bypassing) == before


@pytest.mark.parametrize(
    "labels, error, words",
    [
        (torch.tensor([3, 1, 10, 1]), ValueError, "between 0 and 9, found 10"),
        (torch.tensor([3, -1, 4, 1]), ValueError, "between 0 and 9, found -1"),
        (torch.ones(4, 1, dtype=torch.long), ValueError, r"found torch.int64 of the shape \(4, 1"),
        (torch.rand(4, 9), ValueError, r"shares of the shape \(images, 10\)"),
        (torch.randn(4, 10) * 3, ValueError, "add up to 1, found others"),
        (torch.full((4, 10), float("nan")), ValueError, "add up to 1, found others"),
        ([3, 1, 4, 1], TypeError, "a tensor of numbers, found list"),
        (LABELS > 2, TypeError, "found torch.bool"),
    ],
)
def test_labels_refuses(labels, error, words, swin):
    with random_masks(swin) as masks, pytest.raises(error, match=words):
        with masks.labels(labels):
            pass


@MODELS
def test_a_batch_without_its_labels_is_refused(make, images):
    model = make().eval()
    with random_masks(model) as masks:
        with pytest.raises(RuntimeError, match="no labels say whose"):
            model(images)
        for labels in (LABELS[:2], torch.tensor([1, 2, 3])):  # the first divides the batch
            with pytest.raises(ValueError, match=f"found {len(labels)} labels for 4 images"):
                with masks.labels(labels):
                    model(images)
        with masks.labels(LABELS):  # inner labels hide outer ones, and end with their block
            with masks.labels(LABELS[:2]):
                model(images[:2])
            model(images)


@pytest.mark.parametrize(
    "more, error, words",
    [
        ({"num_classes": 0}, ValueError, "num_classes must be 1 or more"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, found float"),
        ({"num_classes": 2, "initial": float("inf")}, ValueError, "initial must be finite"),
    ],
)
def test_class_masks_refuses(more, error, words, swin):
    with pytest.raises(error, match=words):
        ClassMasks(swin, torch_dimap.group_units(swin), **more)


def slow_penalties(mask):
    """Each penalty from its definition, entry by entry."""
    classes, units = mask.shape
    rows = mask.tolist()
    mean = [sum(row[u] for row in rows) / classes for u in range(units)]
    squares = sum(x * x for row in rows for x in row)
    return {
        "squares": squares,
        "norms": squares**0.5,
        "unit_laplacian": sum(abs(row[u - 1] - 2 * row[u] + row[u + 1])
                              for row in rows for u in range(1, units - 1)),
        "class_difference": sum(abs(rows[c + 1][u] - rows[c][u])
                                for c in range(classes - 1) for u in range(units)),
        "class_mean": sum((row[u] - mean[u]) ** 2 for row in rows for u in range(units)),
    }  # fmt: skip


def test_penalties_are_what_they_are_called(swin):
    with random_masks(swin) as masks:
        assert set(slow_penalties(masks.masks[0])) == set(PENALTIES)
        for name in PENALTIES:
            expected = sum(slow_penalties(mask.double())[name] for mask in masks.masks)
            assert masks.penalty(name).item() == pytest.approx(expected, rel=1e-5)
            masks.penalty(name).backward()
        with pytest.raises(ValueError, match="one of squares, norms, .* found 'l1'"):
            masks.penalty("l1")


def test_scores_add_up_the_magnitudes_of_the_classes(swin):
    masks = random_masks(swin)
    with torch.no_grad():
        for mask in masks.parameters():
            mask.sub_(1)
    for i, layer in enumerate(masks.layers):
        rows = masks.masks[i].detach().double()
        assert torch.equal(masks.scores()[layer], rows.abs().sum(0))
        assert torch.equal(masks.scores(signed=True)[layer], rows.sum(0).abs())
        assert torch.equal(masks.scores([7, 2])[layer], rows[7].abs() + rows[2].abs())
        assert masks.scores()[layer].shape == (layer.units,)


@pytest.mark.parametrize("classes", [[10], [-1], [], [1, 1], ["a"], [1.5]])
def test_scores_refuses_classes_that_there_are_not(classes, swin):
    with random_masks(swin) as masks, pytest.raises(ValueError, match="classes must be different"):
        masks.scores(classes)


def test_training_keeps_what_is_used_and_lets_go_of_what_is_not(images):
    """A head that the projection does not read gives no class anything."""
    model = make_vit().eval()
    heads = torch_dimap.group_units(model)["heads"]
    unused = heads[1].read.along(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    heads[1].read.tensor.data.mul_(unused)
    labels = model(images).argmax(1)
    with ClassMasks(model, heads, 10) as masks:
        optimizer = torch.optim.SGD(masks.parameters(), lr=0.5)
        for _ in range(30):
            optimizer.zero_grad()
            with masks.labels(labels):
                (F.cross_entropy(30 * model(images), labels) + 0.01 * masks.penalty()).backward()
            optimizer.step()
    kept = masks.masks[1].detach()[labels.unique()]
    assert torch.allclose(kept[:, 0], torch.tensor(0.99**30), rtol=1e-4)
    assert not torch.allclose(kept[:, 1:], torch.tensor(0.99**30), rtol=1e-2)


def test_state_goes_through_a_file(swin, tmp_path):
    masks = random_masks(swin)
    torch.save(masks.state_dict(), tmp_path / "masks.pth")
    masks.remove()
    with ClassMasks(swin, torch_dimap.group_units(swin), 10) as fresh:
        fresh.load_state_dict(torch.load(tmp_path / "masks.pth", weights_only=True))
        for own, other in zip(fresh.parameters(), masks.parameters()):
            assert torch.equal(own, other)
    assert sum(p.numel() for p in masks.parameters()) == 10 * sum(x.units for x in masks.layers)
