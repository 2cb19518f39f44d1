"""Models that are rebuilt from the names and shapes in a file."""

from __future__ import annotations

from backbones import build

from torch_dimap import group_parameters
from torch_dimap.files.skeletons import skeleton


def test_skeleton_is_grouped_like_a_model_with_multihead_attention():
    model = build("torchvision vit")
    groups = group_parameters(skeleton(model.state_dict()))
    sizes = {g: [getattr(*pair).numel() for pair in pairs] for g, pairs in groups.items()}
    expected = group_parameters(model)
    assert sizes == {g: [getattr(*pair).numel() for pair in p] for g, p in expected.items()}
