"""A model as one ONNX graph: grey values in, probabilities out, at any height and width.

The graph holds the backbone, the merged adapter and the head. Two parts of a ViT have no exact ONNX
operators or keep the sizes at which a graph is traced: position embeddings, resampled bicubically
with antialiasing, and DINOv3's rotary embedding. They are replaced here by operators that ONNX has.
As a trace may hide other constants, a graph is only written if it gives the model's own
probabilities at other sizes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from emadapt.data.synthetic import at_pixel
from emadapt.errors import EmadaptError, InputError, not_installed
from emadapt.files import whole_file
from emadapt.segment.model import Model, sha256_of
from emadapt.training.model_card import card_of, terms_of

OPSET = 17
"""The first with LayerNormalization; older runtimes do not read newer ones."""
TOLERANCE = 1e-3
"""By which a probability of the graph may differ from the model's."""
TRACED = (1, 6, 5)
"""Images, and rows and columns of patches, at which the graph is traced."""
CHECKED = ((1, 18, 18), (2, 7, 10), (1, 9, 4))
"""Those at which it is compared with the model."""
INPUT, OUTPUT = "image", "probability"
RESAMPLE = "timm.models.vision_transformer.resample_abs_pos_embed"
ROTARY = "timm.layers.pos_embed_sincos._build_grid"

Float = np.ndarray[Any, np.dtype[np.float32]]


class GreyToProbability(nn.Module):
    """(N, 1, H, W) float32 grey values, 0 to 255 -> (N, classes, H, W) probabilities."""

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        logits = self.segmenter(image / 255, image.shape[-2:])
        return torch.as_tensor(logits.softmax(1)[:, 1:])


def write_onnx(model: Model, path: Path) -> dict[str, float]:
    """Write a model as `path`; nothing is left if the graph differs from the model.

    Input and output are those of `GreyToProbability`, H and W multiples of the patch.

    Returns:
        Largest difference of a probability at each of the sizes `CHECKED`, by "N x H x W".
    """
    check_exportable(model)
    whole, patch = GreyToProbability(model.segmenter).eval().cpu(), model.segmenter.patch
    with whole_file(path) as part:
        _trace(whole, patch, part)
        _describe(part, model)
        return _differences(whole, part, patch)


def check_exportable(model: Model) -> None:
    """Raise an InputError where a graph of one image cannot express the model."""
    spec, kind = model.segmenter.spec, model.card["regime"]["kind"]
    reasons = {
        "regime knn searches among its training tokens": kind == "knn",
        f"regime {kind} is a system of another package": kind in ("mitonet", "sam2"),
        f"regime {kind} sees neighbouring slices together": model.segmenter.depth > 1,
        f"`align: {spec.align}` needs the whole volume's grey values": bool(spec.align),
        "`context: 1` sees a slice and its neighbours": bool(spec.context),
    }
    for reason, holds in reasons.items():
        if holds:
            found = f"a model that cannot be one graph: {reason}"
            expected = "a model that sees one image and nothing else, such as frozen or lora"
            do = "Use `emadapt segment`, or train such a unit."
            raise InputError(model.folder, found=found, expected=expected, do=do)


def resampled(
    embedding: torch.Tensor,
    new_size: Sequence[Any],
    old_size: Sequence[int],
    num_prefix_tokens: int = 1,
) -> torch.Tensor:
    """Resample position embeddings (1, prefix + h * w, D) as timm does, in operators of ONNX.

    In a trace, sizes are tensors.
    """
    first, grid = embedding[:, :num_prefix_tokens], embedding[:, num_prefix_tokens:]
    grid = grid.unflatten(1, tuple(old_size))
    rows, columns = (bicubic(old, new) for old, new in zip(old_size, new_size, strict=True))
    grid = torch.einsum("bw,nawd->nabd", columns, torch.einsum("ah,nhwd->nawd", rows, grid))
    return torch.cat([first, grid.flatten(1, 2)], 1)


def bicubic(n_in: int, n_out: Any) -> torch.Tensor:
    """(n_out, n_in) weights of torch's bicubic filter with antialiasing (Keys 1981, a = -0.5)."""
    scale = n_in / torch.as_tensor(n_out, dtype=torch.float32)
    centre = (torch.arange(n_out, dtype=torch.float32) + 0.5) * scale
    places = torch.arange(n_in, dtype=torch.float32) + 0.5
    x = (places[None] - centre[:, None]).abs() / scale.clamp(min=1.0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(1, keepdim=True)


def centred(feat_shape: Sequence[Any], *kind: Any, **settings: Any) -> torch.Tensor:
    """(h, w, 2) places of patches in [-1, 1], as of DINOv3's rotary embedding in timm."""
    offset = settings.get("grid_offset", 0.0)
    places = [
        (torch.arange(n, dtype=torch.float32) + 0.5 + offset) / torch.as_tensor(n)
        for n in feat_shape
    ]
    return 2 * torch.stack(torch.meshgrid(places, indexing="ij"), -1) - 1


def probe(n: int, height: int, width: int, seed: int) -> Float:
    """(n, 1, height, width) grey values from 0 to 255: a part of a synthetic domain."""
    image, _ = at_pixel(seed, 0, 5.0)
    return image[:n, None, :height, :width].astype(np.float32)


def documentation(model: Model) -> str:
    """The model card, and how to feed the graph."""
    facts = "\n".join(f"- {name}: {value}" for name, value in described(model).items())
    card = card_of(model.folder, model.card, with_backbone=True)
    return f"{card}\n## Input and output of the graph\n\n{facts}\n"


def described(model: Model) -> dict[str, str]:
    """What a user of the graph must know, by name."""
    tensors, _ = sha256_of(model.folder)
    return {
        "unit": model.name,
        "input": "float32 grey values 0 (black) to 255 (white), as in an 8-bit image",
        "sides": f"multiples of {model.segmenter.patch} pixels",
        "pixel_nm": json.dumps(pixels_of(model)),
        "classes": ", ".join(model.segmenter.classes),
        "threshold": str(model.card["threshold"]),
        "smooth_z_nm": str(model.segmenter.spec.smooth_z_nm),
        "terms": "; ".join(terms_of(model.card, with_backbone=True)),
        "model_sha256": tensors,
    }


def pixels_of(model: Model) -> dict[str, tuple[float, float]]:
    """Size (y, x) in nm of the pixels that the network sees, by training dataset."""
    spec, out = model.segmenter.spec, {}
    for name, voxel in model.voxels.items():
        longest = max(model.card["shape"][name][1:])
        scale = spec.longest_edge / longest if spec.longest_edge else spec.scale
        y, x = (spec.pixel_nm or side for side in voxel[1:])
        out[name] = (round(y / scale, 4), round(x / scale, 4))
    return out


def open_session(path: Path) -> Any:
    """An onnxruntime session on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise not_installed("onnxruntime", "export") from error
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _trace(whole: nn.Module, patch: int, path: Path) -> None:
    n, rows, columns = TRACED
    image = torch.from_numpy(probe(n, rows * patch, columns * patch, 0))
    dynamic = {0: "n", 2: "height", 3: "width"}
    replaced = mock.patch(RESAMPLE, resampled), mock.patch(ROTARY, centred)
    with warnings.catch_warnings(), torch.no_grad(), replaced[0], replaced[1]:
        warnings.simplefilter("ignore")  # a trace warns of each check of a size
        torch.onnx.export(
            whole,
            (image,),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: dynamic, OUTPUT: dynamic},
        )


def _describe(path: Path, model: Model) -> None:
    """Add metadata to the graph, and check that it is one."""
    import onnx

    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, described(model))
    graph.producer_name, graph.producer_version = "emadapt", str(model.card["version"])
    graph.doc_string = documentation(model)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)


def _differences(whole: nn.Module, path: Path, patch: int) -> dict[str, float]:
    """Compare a graph with its model at the sizes `CHECKED`."""
    session, found = open_session(path), {}
    for seed, (n, rows, columns) in enumerate(CHECKED, 1):
        image = probe(n, rows * patch, columns * patch, seed)
        with torch.inference_mode():
            expected = whole(torch.from_numpy(image)).numpy()
        given = session.run([OUTPUT], {INPUT: image})[0]
        same = given.shape == expected.shape
        away = float(np.abs(given - expected).max()) if same else float("inf")
        found[" x ".join(map(str, (n, *image.shape[2:])))] = away
    if not all(away <= TOLERANCE for away in found.values()):  # also refuses NaN
        raise EmadaptError(
            f"the ONNX graph differs from the model by up to {max(found.values()):.3g} in "
            f"probability ({found}); {TOLERANCE:g} is allowed. Nothing was written. Please report "
            "it with the model's model.json."
        )
    return found
