"""Small randomly initialised networks of the classes of SAM 2 and MitoNet, in files as users have
theirs."""

from pathlib import Path
from typing import Any

import numpy as np
import torch


def write_sam2(folder: Path, side: int = 64) -> Path:
    """A folder with a Sam2Model of 64 x 64 pixels, some 100,000 parameters and predicted IoUs
    around the threshold."""
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model

    vision = {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 8,
            "image_size": [side, side],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 1, 2, 2],
            "window_size_per_stage": [4, 4, 4, 2],
            "global_attention_blocks": [3],
        },
        "backbone_channel_list": [64, 32, 16, 8],
        "fpn_hidden_size": 32,
        "model_type": "sam2_vision_model",
        "backbone_feature_sizes": [[side // 4] * 2, [side // 8] * 2, [side // 16] * 2],
    }
    prompt = {"hidden_size": 32, "image_size": side, "patch_size": 16, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 32,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    }
    torch.manual_seed(0)
    network = Sam2Model(
        Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    network.save_pretrained(folder)
    whole, quarter = {"height": side, "width": side}, {"height": side // 4, "width": side // 4}
    Sam2ImageProcessor(size=whole, mask_size=quarter).save_pretrained(folder)
    return folder


SMALL: dict[str, dict[str, Any]] = {
    "DEEPLAB": {
        "encoder": "resnet18",
        "stage4_stride": 32,
        "decoder_channels": 8,
        "low_level_channels_project": [4],
        "aspp_channels": 8,
        "subdivision_num_points": 64,
    },
    "BIFPN": {"encoder": "resnet18", "fpn_dim": 8, "fpn_layers": 1, "subdivision_num_points": 64},
}


def write_mitonet(file: Path, monkeypatch: Any, kind: str = "DEEPLAB") -> Path:
    """A state dict of MitoNet with a ResNet-18 and narrow decoders; the settings of
    `emadapt.models.mitonet` become its own."""
    import empanada.models

    from emadapt.models import mitonet

    monkeypatch.setattr(mitonet, kind, getattr(mitonet, kind) | SMALL[kind])
    torch.manual_seed(0)
    network = mitonet._network(kind == "BIFPN")
    assert isinstance(network, (empanada.models.PanopticDeepLabPR, empanada.models.PanopticBiFPNPR))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # Its authors start the heads near zero: all answers would be alike.
            if "semantic" in name and parameter.ndim > 1:
                parameter.normal_(std=0.3)
    torch.save(network.state_dict(), file)
    return file


def scene(seed: int = 0, shape: tuple[int, int] = (90, 120)) -> tuple[np.ndarray, np.ndarray]:
    """Bright rectangles on noise, some of which touch: uint8 image and label."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, bool)
    for _ in range(6):
        y, x = rng.integers(0, shape[0] - 8), rng.integers(0, shape[1] - 8)
        label[y : y + rng.integers(1, 20), x : x + rng.integers(1, 20)] = True
    return (rng.normal(90, 12, shape) + 90 * label).clip(0, 255).astype(np.uint8), label
