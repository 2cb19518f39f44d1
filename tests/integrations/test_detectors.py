"""Detectors and segmenters: what is grouped with their backbone, and what can be counted."""

from __future__ import annotations

import pytest
import torch
from conftest import make_swin
from torch import nn

from torch_dimap import count_flops, global_module_aware_unstructured, group_parameters, summarize


def test_a_segmenters_decoder_is_told_of_and_its_backbone_is_one_call():
    transformers = pytest.importorskip("transformers")
    swin = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2],
        window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(
            backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
            encoder_feedforward_dim=64, dim_feedforward=64, encoder_layers=1, decoder_layers=2,
            num_attention_heads=2,
        )
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"lie outside of model.pixel_level_module.encoder and"):
        everything = group_parameters(model)
    backbone = group_parameters(model.model.pixel_level_module.encoder)
    assert {g: len(pairs) for g, pairs in backbone.items()} == {"qkv": 12, "proj": 4, "mlp": 8}
    assert all(set(backbone[group]) <= set(everything[group]) for group in backbone)
    global_module_aware_unstructured(backbone, amount=0.5)
    assert summarize(model, parameters=backbone).prunable.density == 0.5


class Detector(nn.Module):
    """A backbone whose features regions are cut out of, as in torchvision's detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = make_swin().eval()
        self.box_head = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(4))

    def forward(self, images):
        from torchvision.ops import roi_align

        boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
        features = self.backbone.forward_features(images).permute(0, 3, 1, 2)
        return roi_align(features, boxes, (2, 2))


def test_coverage_is_asked_of_the_backbone_alone(recwarn):
    groups = group_parameters(Detector())  # its head has more weights than the backbone
    assert {g: len(pairs) for g, pairs in groups.items()} == {"qkv": 4, "proj": 4, "mlp": 8}
    assert not [w for w in recwarn if "group_parameters" in str(w.message)]


def test_flops_of_a_detector_are_refused_with_remedies_that_work(images):
    model = Detector()
    with pytest.raises(NotImplementedError, match=r"count_flops\(model.backbone, images\)"):
        count_flops(model, images)
    whole = count_flops(model, images, op_handles={"torchvision::roi_align": None})
    backbone = count_flops(model.backbone, images)
    assert backbone.groups == whole.groups and whole.dense > 0
