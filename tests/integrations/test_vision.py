"""optimize() of timm's and torchvision's models."""

from __future__ import annotations

import pytest
import torch

import gpt4fast

SMALL = {"depths": (1, 1), "embed_dim": 32, "num_heads": (2, 4), "window_size": 4}
TIMM = {  # name -> (options, whether its attention is torch's function)
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 2}, True),
    "beit_base_patch16_224": ({"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4}, True),
    "davit_tiny": ({"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (2, 4)}, True),
    "xcit_nano_12_p16_224": ({"img_size": 64, "depth": 2}, True),
    "swin_tiny_patch4_window7_224": ({"img_size": 64, **SMALL}, False),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 32)}, False),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name, check_optimized) -> None:
    timm = pytest.importorskip("timm")
    options, attends = TIMM[name]
    images = torch.randn(2, 3, 64, 64)
    fast, calls = check_optimized(
        timm.create_model(name, pretrained=False, num_classes=7, **options), lambda model: model(images)
    )
    assert (calls["attention"] > 0) == attends
    norms = [row for row in gpt4fast.explain(fast) if "layer norm over channels" in row.why]
    assert bool(norms) == (name in ("davit_tiny", "convnext_atto"))


def test_timm_attention_that_is_fused_on_request(check_optimized) -> None:
    layers = pytest.importorskip("timm.layers")
    layers.set_fused_attn(True, experimental=True)  # Swin's windows
    try:
        swin = pytest.importorskip("timm").create_model("swin_tiny_patch4_window7_224", img_size=64, **SMALL)
    finally:
        layers.set_fused_attn(True)
    images = torch.randn(2, 3, 64, 64)
    _, calls = check_optimized(swin, lambda model: model(images))
    assert calls == {"attention": 2}


@pytest.mark.parametrize("name", ["ViT", "Swin", "ConvNeXt"])
def test_torchvision_classifiers(name, check_optimized) -> None:
    models = pytest.importorskip("torchvision.models")
    make, attentions = {
        "ViT": (lambda: models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=5), 2),
        "Swin": (lambda: models.SwinTransformer([4, 4], 32, [1, 1], [2, 4], [4, 4], num_classes=5), 0),
        "ConvNeXt": (
            lambda: models.ConvNeXt(
                [models.convnext.CNBlockConfig(16, 32, 1), models.convnext.CNBlockConfig(32, None, 1)], num_classes=5
            ),
            0,
        ),
    }[name]
    images = torch.randn(2, 3, 64, 64)
    _, calls = check_optimized(make(), lambda model: model(images))
    assert calls["attention"] == attentions


def test_torchvision_heads_of_detectors(check_optimized) -> None:
    """Mask R-CNN's head is a transposed convolution and a ReLU, one pass; the keypoints' a transposed convolution."""
    detection = pytest.importorskip("torchvision.models.detection")
    features = torch.randn(3, 32, 14, 14)
    mask, calls = check_optimized(detection.mask_rcnn.MaskRCNNPredictor(32, 32, 5), lambda model: model(features))
    assert calls == {"conv_transpose": 1}
    assert mask.conv5_mask.activation == "relu"
    _, calls = check_optimized(detection.keypoint_rcnn.KeypointRCNNPredictor(32, 5), lambda model: model(features))
    assert calls == {"conv_transpose": 1}
