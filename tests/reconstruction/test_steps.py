"""The forward in steps: as often as needed, and no oftener."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conftest import make_swin
from torch import nn

from torch_dimap import global_module_aware_unstructured, group_parameters, reconstruct


class Net(nn.Module):
    """Four blocks of two layers each, wired by a forward that a test gives."""

    def __init__(self, wiring, depth=4):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(
            BLOCKS.get(wiring, nn.Sequential)(
                nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 8)
            )
            for _ in range(depth)
        )
        self.wiring = wiring

    def forward(self, x):
        return self.wiring(self.stem(x), self.blocks)


def chain(x, blocks):
    for block in blocks:
        x = x + block(x)
    return x


def skips(x, blocks):
    first = blocks[0](x)
    second = blocks[1](first)
    third = blocks[2](second + 2 * first)
    return blocks[3](third * first)  # the first is used long after it was made


def in_place(x, blocks):
    for block in blocks:
        x = block(x)
        x += 1.0
    return x


def shared(x, blocks):
    return blocks[1](blocks[0](blocks[0](x)))


def picked(x, blocks):
    order = blocks[0](x).sum(1).argsort()  # autograd knows nothing of that
    x = x + blocks[1](x)
    x = x + blocks[2](x)
    return blocks[3](x[order[:10]])


def detached(x, blocks):
    first = blocks[0](x).detach()
    x = x + blocks[1](x)
    x = x + blocks[2](x)
    return blocks[3](x + first)


def changed_inside(x, blocks):
    return chain(x, blocks)


class ChangesItsInput(nn.Sequential):
    def forward(self, x):
        return super().forward(x.relu_())


def remembered(x, blocks):
    x = blocks[0](x)
    for block in blocks[1:]:
        x = block(x) + blocks[0].kept
    return x


class Remembers(nn.Sequential):
    def forward(self, x):
        self.kept = 2 * x
        return super().forward(x)


def collected(x, blocks):
    found = []
    for block in blocks:
        x = block(x, found)
    return sum(found)


class Collects(nn.Sequential):
    def forward(self, x, found):
        x = super().forward(x)
        found.append(x)
        return x + found[0]


def wrapped(x, blocks):
    for block in blocks:
        y = block(x).x
        y += x
        x = y
    return x


@dataclass
class Output:
    x: torch.Tensor


class Wraps(nn.Sequential):
    def forward(self, x):
        return Output(super().forward(x))


BLOCKS = {
    changed_inside: ChangesItsInput, remembered: Remembers, collected: Collects, wrapped: Wraps,
}  # fmt: skip
WIRINGS = pytest.mark.parametrize(
    "wiring", [chain, skips, in_place, shared, picked, detached, *BLOCKS]
)


def pruned_net(wiring):
    net = Net(wiring)
    pairs = [(layer, "weight") for block in net.blocks for layer in block if len(list(
        layer.parameters()))]  # fmt: skip
    global_module_aware_unstructured(pairs, amount=0.5)
    return net


@WIRINGS
@pytest.mark.filterwarnings("ignore:.*left alone")
def test_steps_change_nothing_of_the_outcome(wiring, monkeypatch):
    batches = torch.randn(60, 5, generator=torch.Generator().manual_seed(1)).split(20)
    whole, cut = pruned_net(wiring), pruned_net(wiring)
    cut_misfits = reconstruct(cut, batches)
    monkeypatch.setattr("torch_dimap.reconstruction.steps._LEVELS", 1000)
    whole_misfits = reconstruct(whole, batches)  # one step: nothing is kept
    assert list(whole_misfits) == list(cut_misfits)
    for a, b in zip(whole.parameters(), cut.parameters()):
        assert torch.equal(a, b)


def test_blocks_run_a_few_times_each_whatever_the_depth():
    model = make_swin()
    global_module_aware_unstructured(group_parameters(model), amount=0.5)
    runs = []
    for stage in model.layers:
        for block in stage.blocks:
            block.norm1.register_forward_hook(lambda *_: runs.append(1))
    reconstruct(model, [torch.randn(2, 1, 16, 16)])
    # Two traces and three runs that see whether the steps hold; for each of four levels and
    # for the outputs, once in either stream.
    assert len(runs) <= 4 * (2 + 3 + 2 * 5)


def test_forwards_draw_the_same_random_numbers_and_none_of_the_callers():
    def noisy(x, blocks):
        for block in blocks:
            x = block(nn.functional.dropout(x, 0.1, training=True))
        return x

    nets = [pruned_net(noisy) for _ in range(2)]
    for net in nets:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        reconstruct(net, [torch.ones(20, 5)])
        assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*left alone")
def test_a_shared_layer_sees_what_it_saw_before_its_inputs_were_changed_in_place():
    def added(x, blocks):
        for _ in range(3):
            x = x + blocks[0][0](x)
        return x

    def added_in_place(x, blocks):
        for _ in range(3):
            x += blocks[0][0](x)
        return x

    nets = [pruned_net(added), pruned_net(added_in_place)]
    misfits = [reconstruct(net, [torch.linspace(-1, 1, 100).view(20, 5)]) for net in nets]
    assert misfits[0] == misfits[1]
    assert torch.equal(nets[0].blocks[0][0].weight_orig, nets[1].blocks[0][0].weight_orig)


def test_a_change_in_place_begins_a_new_level():
    def residual(x, blocks):
        x += blocks[0][0](x)
        return blocks[0][2](x)

    batches = [torch.randn(40, 5)]
    net = pruned_net(residual)
    with pytest.warns(UserWarning, match="left alone"):
        reconstruct(net, batches)
    again = pruned_net(residual)
    first = again.blocks[0][0]
    reconstruct(again, batches, groups=[(first, "weight")])
    assert torch.equal(first.weight_orig, net.blocks[0][0].weight_orig)
    # What the second is fitted to was made by the refitted first.
    x = again.stem(batches[0]).detach()
    x = x + first(x)
    dense = pruned_net(residual)
    y = dense.stem(batches[0]).detach()
    y = y + nn.functional.linear(y, dense.blocks[0][0].weight_orig, dense.blocks[0][0].bias)
    wanted = nn.functional.linear(y, dense.blocks[0][2].weight_orig, dense.blocks[0][2].bias)
    last = net.blocks[0][2]
    given = nn.functional.linear(x, last.weight, last.bias)
    assert abs((given - wanted).mean()) < 1e-5  # the bias takes all of the mean


def test_batches_that_use_layers_differently_are_refused():
    def picky(x, blocks):
        return chain(x, blocks[: 4 if len(x) > 1 else 1])

    net = pruned_net(picky)
    with pytest.raises(RuntimeError, match="must be used alike in all batches, found batch 1"):
        reconstruct(net, [torch.randn(20, 5), torch.randn(1, 5)])


def test_layers_that_the_forward_does_not_use_are_named():
    net = pruned_net(lambda x, blocks: blocks[0](x))
    with pytest.warns(UserWarning, match="9|more left alone|left alone"):
        misfits = reconstruct(net, [torch.randn(20, 5)])
    assert len(misfits) == 3
