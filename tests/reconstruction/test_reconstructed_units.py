"""Whole units masked, the rest refitted, the units removed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from backbones import build, images, outputs
from conftest import make_swin, make_vit

from torch_dimap import (
    global_module_aware_structured,
    group_units,
    reconstruct,
    remove_units,
)

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = pytest.mark.parametrize("sequential", [True, False])


def mask_in_each_layer(model, amount):
    """Mask a share of every layer's heads and neurons, so that no layer keeps all."""
    layers = [layer for group in group_units(model).values() for layer in group]
    global_module_aware_structured({x.name: [x] for x in layers}, amount, multiple=1)
    return model


@pytest.fixture(params=[make_swin, make_vit], ids=["swin", "vit"])
def masked(request):
    """A model with half of its heads and neurons masked, and the dense one."""
    dense = request.param().eval()
    return mask_in_each_layer(copy.deepcopy(dense), 0.5), dense


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 1, 16, 16, generator=generator) for _ in range(4)]


def distance(model, dense, batches):
    with torch.no_grad():
        pairs = [(model(x), dense(x)) for x in batches]
    return float(sum((a - b).norm() for a, b in pairs) / sum(b.norm() for _, b in pairs))


@BOTH
def test_reconstruct_changes_the_kept_columns_of_what_reads_units_alone(
    masked, batches, sequential
):
    model, dense = masked
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a bias per head is masked too, and is no layer's weight
        misfits = reconstruct(model, batches, sequential=sequential)
    units, were = group_units(model), group_units(dense)
    for layer, old in ((x, y) for kind in units for x, y in zip(units[kind], were[kind])):
        keep, now, before = layer.read.along(layer.alive()), layer.read.tensor, old.read.tensor
        assert 0 < keep.sum() < len(keep)
        assert torch.equal(now[:, ~keep], before[:, ~keep])
        assert (now[:, keep] != before[:, keep]).any(0).all()
        assert not layer.reader.weight[:, ~keep].any()
    readers = [m for name, m in misfits.items() if name.endswith(("proj.weight", "fc2.weight"))]
    assert readers and all(misfit.after < misfit.before for misfit in readers)


@BOTH
def test_reconstruct_brings_a_model_without_units_closer_to_the_dense_one(
    masked, batches, sequential
):
    model, dense = masked
    before = distance(model, dense, batches)
    reconstruct(model, batches, sequential=sequential)
    assert distance(model, dense, batches) < 0.7 * before


def test_remove_units_keeps_what_reconstruct_made(masked, batches):
    model, _ = masked
    reconstruct(model, batches)
    with torch.no_grad():
        expected = model(batches[0])
        slim = remove_units(model)(batches[0])
    torch.testing.assert_close(slim, expected, atol=2e-6, rtol=2e-6)
    assert not any(name.endswith("weight_mask") for name, _ in model.named_buffers())


@pytest.mark.parametrize("family", ["swin", "swinv2", "twins", "torchvision vit", "maxvit"])
def test_remove_units_keeps_what_reconstruct_made_in_other_families(family):
    model, x = mask_in_each_layer(build(family).eval(), 0.5), images(family, 4)
    reconstruct(model, x.split(2))
    with torch.no_grad():
        expected = outputs(model, x)
        slim = outputs(remove_units(model), x)
    torch.testing.assert_close(slim, expected, atol=1e-5, rtol=1e-5)
