"""Class masks and layer rates under torch.compile and DistributedDataParallel."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import make_swin, make_vit
from scripts import in_forks
from torch.nn.parallel import DistributedDataParallel

import torch_dimap
from torch_dimap.learning import ClassMasks, HeldCost, Joined, LayerRates

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([3, 1, 4, 1])


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about itself
        yield


def masks_on(model):
    masks = ClassMasks(model, torch_dimap.group_units(model), 10)
    with torch.no_grad():
        for i, mask in enumerate(masks.parameters()):
            mask.copy_(torch.rand(mask.shape, generator=torch.Generator().manual_seed(i)) * 2)
    return masks


def rates_on(model):
    units = torch_dimap.group_units(model)
    scores = {x: torch.arange(x.units).float() for members in units.values() for x in members}
    return LayerRates(model, units, scores, IMAGES[:1], HeldCost(0.6), initial=0.3)


def one_stage():
    return make_swin(depths=(2,))  # the compiler takes its time for each block


@pytest.mark.parametrize("make", [make_vit, one_stage])
def test_compiled_model_takes_the_masks_of_each_batch(make, fresh_compiler):
    model = make().eval()
    dense = model(IMAGES)
    masks = masks_on(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    shares = torch.full((4, 10), 0.1)
    for labels in (LABELS, LABELS.flip(0), shares):  # the second runs what the first compiled
        gradients = []
        for one in (model, compiled):
            masks.zero_grad()
            with masks.labels(labels):
                one(IMAGES).square().sum().backward()
            gradients.append([mask.grad.clone() for mask in masks.parameters()])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="no labels say whose|Observed exception"):
        compiled(IMAGES)
    masks.remove()
    torch.testing.assert_close(compiled(IMAGES), dense, rtol=1e-5, atol=1e-5)


def test_compiled_model_follows_the_rates(fresh_compiler):
    model = one_stage().eval()
    rates = rates_on(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for logit in (-1.0, 0.5):
        with torch.no_grad():
            rates.logits.fill_(logit)
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    gradients = []
    for one in (model, compiled):
        rates.zero_grad()
        (one(IMAGES).square().sum() + rates.penalty()).backward()
        gradients.append(rates.logits.grad)
        rates.logits.grad = None
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def train_masks(masks, forward, parts):
    """Step on the mean of the gradients over the parts of a batch, as DDP takes it."""
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for images, labels in parts:
            with masks.labels(labels):
                loss = F.cross_entropy(forward(images), labels)
                (loss / len(parts) + 1e-3 * masks.penalty() / len(parts)).backward()
        optimizer.step()


def train_rates(model, rates, forward, parts):
    optimizer = torch.optim.SGD([*model.parameters(), *rates.parameters()], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for images, labels in parts:
            loss = F.cross_entropy(forward(images), labels) + rates.penalty()
            (loss / len(parts)).backward()
        optimizer.step()
        rates.update()


def work(rank, address):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    halves = [(IMAGES[i::2], LABELS[i::2]) for i in range(2)]
    model, alone = make_swin().eval(), make_swin().eval()
    masks, expected = masks_on(model), masks_on(alone)
    train_masks(masks, DistributedDataParallel(Joined(model, masks)), [halves[rank]])
    train_masks(expected, alone, halves)
    torch.testing.assert_close(masks.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)
    model, alone = make_vit().eval(), make_vit().eval()
    rates, expected = rates_on(model), rates_on(alone)
    train_rates(model, rates, DistributedDataParallel(Joined(model, rates)), [halves[rank]])
    train_rates(alone, expected, alone, halves)
    torch.testing.assert_close(rates.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-5)
    assert rates.hard == expected.hard
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_learn_like_one(tmp_path):
    in_forks(work, 2, f"file://{tmp_path}/rendezvous")
