"""Arrays in a message, and what arrives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_dimap.sharding.messages import packed, unpacked

KINDS = {
    "float32": lambda x: x.astype(np.float32),
    "upper half": lambda x: (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32),
    "float16": lambda x: np.clip(x, 0, 6e4).astype(np.float16).astype(np.float32),
    "float64": lambda x: x,
    "digits": lambda x: x.astype(np.int64).astype(np.uint8),
    "few": lambda x: x.astype(np.int64) % 1000,
    "many": lambda x: x.astype(np.int64),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 40), st.booleans())),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_arrays_arrive_as_they_were(wanted, seed):
    rng = np.random.default_rng(seed)
    parts = []
    for kind, length, ascending in wanted or [("float32", 0, True)]:
        values = KINDS[kind](np.abs(rng.standard_normal(length)) * 10.0 ** rng.integers(-3, 16))
        counts = rng.integers(0, 2**40, length) if rng.random() < 0.5 else None
        parts.append(((float(length),), np.sort(values) if ascending else values, counts))
    for sent, told in zip(parts, unpacked(packed(parts)), strict=True):
        assert sent[0] == told[0]
        for here, there in zip(sent[1:], told[1:]):
            assert (here is None) == (there is None)
            if here is not None:
                assert here.dtype == there.dtype
                np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("value", [np.inf, -0.0, -1.5, 1e-45, 3.4e38])
def test_odd_numbers_arrive_too(value):
    sent = np.array([value, 0.0, value], np.float32)
    ((_, told, _),) = unpacked(packed([((), sent, None)]))
    assert told.tobytes() == sent.tobytes()


def test_a_sample_takes_less_than_a_byte_for_each_entry():
    rng = np.random.default_rng(0)
    bits = np.sort(np.abs(rng.standard_normal((24, 128)))).astype(np.float32).view(np.uint32)
    parts = [((), row, None) for row in (bits & 0xFFFF0000).view(np.float32)]
    assert len(packed(parts)) < bits.size
