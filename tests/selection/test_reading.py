"""Reading weights: what is found, and how often it is done."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from torch_dimap import DimapUnstructured, global_module_aware_unstructured
from torch_dimap.selection import search, threaded_map
from torch_dimap.selection.reading import blocks_of, pick, read_part, read_weight, weight_of


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("masked", [False, True])
def test_select_names_the_weight_that_is_not_finite(dtype, value, masked):
    weights = [torch.ones(5, dtype=dtype), torch.tensor([1.0, value, 2.0], dtype=dtype)]
    masks = [None, torch.tensor([True, False, True])] if masked else None
    with pytest.raises(ValueError, match="the second holds NaN or infinite values"):
        search.select(weights, 3, masks, ["the first", "the second"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e8, 1e30])  # float32 cannot hold all squares
def test_a_first_reading_tells_the_energy_nearly(dtype, size):
    values = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    flat = read_weight(blocks_of(values, None), "weight")
    exact = (values.double() * flat.scale).square().sum().item()
    assert flat.energy == pytest.approx(exact, rel=1e-5)


def test_a_part_of_zeros_leaves_the_scale_to_the_other_parts():
    tiny = torch.full((4,), 1e-200, dtype=torch.float64)
    for zeros in (torch.zeros(4, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)):
        parts = [blocks_of(zeros, None), blocks_of(tiny, None)]
        together = weight_of(parts[1], [read_part(part) for part in parts], "weight")
        alone = read_weight(parts[1], "weight")
        assert (together.scale, together.energy) == (alone.scale, alone.energy)
        assert together.energy > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_pick_finds_what_indexing_finds(dtype, share):
    generator = torch.Generator().manual_seed(0)
    for size in [*range(20), 1000, 1027]:
        values = torch.randn(size, generator=generator).to(dtype)
        flags = torch.rand(size, generator=generator) < share
        found = pick(values, flags)
        assert found.dtype == dtype and torch.equal(found, values[flags])


def test_pruning_reads_for_nan_and_for_its_ranking_at_once(monkeypatch):
    layer = nn.Linear(300, 300)

    def refuse(*_):
        raise AssertionError("a reading for extremes alone")

    monkeypatch.setattr(torch, "aminmax", refuse)
    global_module_aware_unstructured([(layer, "weight")], amount=0.5)
    assert int(layer.weight_mask.sum()) == 45_000


def test_pruning_with_nan_in_a_later_group_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight.data[0, 0] = float("nan")
    groups = {"a": [(net[0], "weight")], "b": [(net[1], "weight")]}
    with pytest.raises(ValueError, match=r"parameters\['b'\]\[0\] \(Linear.weight\) holds NaN"):
        global_module_aware_unstructured(groups, DimapUnstructured, amount=0.5)
    assert isinstance(net[0].weight, nn.Parameter) and not net[0]._forward_pre_hooks


def test_select_takes_no_sample_of_weights_smaller_than_one(monkeypatch):
    def refuse(*_):
        raise AssertionError("a sample of few entries")

    monkeypatch.setattr(search, "take_sample", refuse)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(30, 40, generator=generator) for _ in range(5)]
    keeps, _ = search.select(weights, 3000)
    assert sum(int(keep.sum()) for keep in keeps) == 3000


def test_threads_started_meanwhile_keep_the_setting_of_all():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threaded_map(4) as map_:
            assert set(map_(lambda _: torch.get_num_threads(), range(4))) == {1}
            seen: list[int] = []
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
            assert seen == [2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_an_interrupt_while_threads_begin_leaves_none_waiting_and_the_setting_of_all(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted_at_second(ThreadPoolExecutor))
    try:
        with pytest.raises(KeyboardInterrupt), threaded_map(4):
            raise AssertionError("unreachable")
        seen: list[int] = []
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def interrupted_at_second(pool):
    """Return ``submit`` as if Ctrl-C came after the first worker has begun to wait."""
    submit, done = pool.submit, []

    def interrupted(self, function):
        if done:
            time.sleep(0.1)
            raise KeyboardInterrupt
        done.append(submit(self, function))
        return done[0]

    return interrupted
