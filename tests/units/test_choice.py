"""Which units go: exact counts, whole multiples, ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_dimap.units.choice import LayerScores, choose_units


def layers(*scores, multiple=1):
    return [
        LayerScores(torch.tensor(s, dtype=torch.float64), torch.ones(len(s)).bool(), multiple)
        for s in scores
    ]


def kept(keeps):
    return [keep.nonzero().flatten().tolist() for keep in keeps]


def test_choose_units_takes_the_lowest_of_all_layers():
    keeps, threshold = choose_units(layers([0.1, 0.9, 0.5], [0.3, 0.2]), 2, minimum=1)
    assert kept(keeps) == [[1, 2], [0]]
    assert threshold == 0.2


def test_choose_units_goes_on_in_other_layers_where_one_has_its_minimum():
    keeps, threshold = choose_units(layers([0.1, 0.2], [0.8, 0.9, 1.0]), 3, minimum=1)
    assert kept(keeps) == [[1], [2]]
    assert threshold == 0.9


def test_choose_units_may_empty_a_layer_with_a_minimum_of_none():
    keeps, _ = choose_units(layers([0.1, 0.2], [0.8, 0.9]), 2, minimum=0)
    assert kept(keeps) == [[], [0, 1]]


def test_choose_units_takes_the_later_layer_and_the_later_unit_where_scores_tie():
    keeps, _ = choose_units(layers([0.5] * 3, [0.5] * 3), 3, minimum=1)
    assert kept(keeps) == [[0, 1], [0]]


def test_choose_units_leaves_units_masked_that_were_before():
    known = layers([0.1, 0.2, 0.3, 0.4])
    known[0].unmasked[2] = False
    keeps, _ = choose_units(known, 1, minimum=1)
    assert kept(keeps) == [[1, 3]]


def test_choose_units_keeps_multiples_and_the_nearest_total():
    ascending = [i / 100 for i in range(40)]
    keeps, _ = choose_units(layers(ascending, [2.0] * 32, multiple=16), 22, minimum=1)
    assert [int(keep.sum()) for keep in keeps] == [16, 32]
    keeps, _ = choose_units(layers(ascending, [2.0] * 32, multiple=16), 4, minimum=1)
    assert [int(keep.sum()) for keep in keeps] == [40, 32]  # 0 and 8 are as near: the fewer go


def test_choose_units_takes_single_units_of_layers_smaller_than_the_multiple():
    keeps, _ = choose_units(layers([0.1, 0.2, 0.3], [0.5] * 20, multiple=16), 2, minimum=1)
    assert [int(keep.sum()) for keep in keeps] == [1, 20]


def test_choose_units_refuses_what_minimum_and_multiple_do_not_allow():
    with pytest.raises(ValueError, match="5 units are to go, but only 4 can"):
        choose_units(layers([1.0] * 3, [1.0] * 3), 5, minimum=1)
    with pytest.raises(ValueError, match="only 16 can"):
        choose_units(layers([1.0] * 32, multiple=16), 30, minimum=1)
    with pytest.raises(ValueError, match="only 14 can"):  # these go one by one
        choose_units(layers([1.0] * 8, [1.0] * 8, multiple=16), 16, minimum=1)


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(0, 3),
    st.sampled_from([1, 2, 4]),
)
def test_choose_units_holds_what_it_promises(scores, share, minimum, multiple):
    known = layers(*[[float(x) for x in s] for s in scores], multiple=multiple)
    count = int(share * sum(max(0, len(s) - minimum) for s in scores))
    try:
        keeps, threshold = choose_units(known, count, minimum)
    except ValueError:
        assert multiple > 1
        return
    gone = sum(len(s) for s in scores) - sum(int(keep.sum()) for keep in keeps)
    assert abs(gone - count) <= multiple // 2
    for layer, keep in zip(known, keeps):
        size, left = len(keep), int(keep.sum())
        assert left >= min(minimum, size)
        assert left == size or size < multiple or left % multiple == 0
        if left < size:
            assert layer.scores[~keep].max() <= threshold
        if 0 < left < size:
            assert layer.scores[~keep].max() <= layer.scores[keep].min()
