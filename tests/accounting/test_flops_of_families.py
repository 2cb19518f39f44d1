"""FLOPs of every family that is grouped: each layer credited, masked and baked alike."""

from __future__ import annotations

import backbones
import pytest

from torch_dimap import (
    count_flops,
    global_module_aware_unstructured,
    group_parameters,
    remove_all,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_count_flops_credits_every_group_of_every_family(family):
    model, images = backbones.build(family).eval(), backbones.images(family)
    dense = count_flops(model, images).dense
    global_module_aware_unstructured(group_parameters(model), amount=0.4)
    count = count_flops(model, images)
    assert count.dense == dense
    assert all(f.dense > f.masked for f in count.layers.values())
    assert count_flops(remove_all(model), images) == count
