"""A model as one ONNX graph, backbone and merged adapter and head: grey values in, probabilities out, at any height and width.

Three things stand in the way of dynamic sizes, and are settled here. A ViT's position embedding is resampled to the grid by
a bicubic filter with antialiasing, which ONNX has no exact operator for: in the graph it is two matrix products, whose matrices
are computed from the sizes. DINOv3's rotary embedding divides by the sizes as numbers, which a trace would keep. And a trace
may hide another constant that only holds at the size it was traced at: so nothing is called exported before the graph has given
the model's own probabilities at other sizes.
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

from emadapt.errors import EmadaptError, InputError
from emadapt.segment.model import Model, sha256_of
from emadapt.training.model_card import card_of, terms_of

OPSET = 17
"""The first with LayerNormalization; older runtimes do not read newer ones."""
TOLERANCE = 1e-3
"""By which a probability of the graph may differ from the model's."""
TRACED = (1, 6, 5)
"""Images, and rows and columns of patches, that the graph is traced at."""
CHECKED = ((1, 18, 18), (2, 7, 10), (1, 9, 4))
"""Those that it must give the model's probabilities at."""
LARGEST = 2 * 10**9
"""Bytes of weights: one file of ONNX holds 2 GiB."""
INPUT, OUTPUT = "image", "probability"
RESAMPLE = "timm.models.vision_transformer.resample_abs_pos_embed"
ROTARY = "timm.layers.pos_embed_sincos._build_grid"


def write_onnx(model: Model, path: Path) -> dict[str, float]:
    """Write a model as `path` and compare the file with the model; nothing is left where they differ.

    The graph takes `image`, (N, 1, H, W) float32 grey values from 0 to 255, H and W multiples of the patch, and gives
    `probability`, (N, 1, H, W) float32. Its metadata name the pixel size, the threshold and the terms.

    Returns:
        Largest difference of a probability at each of the sizes `CHECKED`, by "N x H x W".

    Raises:
        InputError: a model that is no function of an image alone, or too large.
        EmadaptError: the file does not give the model's probabilities.
    """
    check_exportable(model)
    whole = GreyToProbability(model.segmenter).eval().cpu()
    part = path.with_name(f".{path.name}.part")
    try:
        _trace(whole, model, part)
        _describe(part, model)
        found = _differences(whole, part, model.segmenter.backbone.arch.patch)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return found


def check_exportable(model: Model) -> None:
    """Refuse what a graph of one image cannot express.

    Raises:
        InputError: of those models.
    """
    segmenter, reason = model.segmenter, ""
    if segmenter.regime.kind == "knn":
        reason = "regime knn, whose answer is a search among its training tokens"
    elif segmenter.regime.outside:
        reason = f"regime {segmenter.regime.kind}, a system of another package, which has exports of its own"
    elif segmenter.regime.is_3d:
        reason = f"regime {segmenter.regime.kind}, which sees neighbouring slices together"
    elif segmenter.domains:
        reason = f"regime with `align: {segmenter.regime.align}`, where a part of the model is chosen for each volume"
    elif segmenter.spec.align not in ("", "voxel"):
        reason = f"backbone with `align: {segmenter.spec.align}`, which needs the grey values of the whole volume"
    elif segmenter.spec.context:
        reason = "backbone with `context: 1`, which sees a slice and its two neighbours"
    elif segmenter.backbone.stride != segmenter.backbone.arch.patch:
        reason = "overlapping patches (`stride` of the backbone)"
    elif sum(p.numel() for p in segmenter.parameters()) * 4 > LARGEST:
        reason = "more weights than the 2 GB that one file of ONNX holds"
    if reason:
        raise InputError(
            model.folder,
            found=f"a model that cannot be one graph: {reason}",
            expected="a model that sees one image and nothing else, e.g. regime frozen or lora",
            do="Use `emadapt segment`, or train such a unit.",
        )


class GreyToProbability(nn.Module):
    """(N, 1, H, W) grey values from 0 to 255 -> (N, 1, H, W) probabilities of foreground, all in float32."""

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.segmenter(image / 255, image.shape[-2:])
        return torch.as_tensor(logits.softmax(1)[:, 1:])


def resampled(
    embedding: torch.Tensor,
    new_size: Sequence[Any],
    old_size: Sequence[int],
    num_prefix_tokens: int = 1,
) -> torch.Tensor:
    """Position embeddings (1, prefix + h * w, D) for another grid, as timm resamples them, in operators that ONNX has.

    Args:
        embedding: of the class token and registers, then of the patches row by row.
        new_size: rows and columns; in a trace, tensors.
        old_size: (h, w).
        num_prefix_tokens: number of the first ones, which stay.
    """
    first, grid = (
        embedding[:, :num_prefix_tokens],
        embedding[:, num_prefix_tokens:].unflatten(1, tuple(old_size)),
    )
    rows, columns = (bicubic(old, new) for old, new in zip(old_size, new_size, strict=True))
    grid = torch.einsum("bw,nawd->nabd", columns, torch.einsum("ah,nhwd->nawd", rows, grid))
    return torch.cat([first, grid.flatten(1, 2)], 1)


def centred(
    feat_shape: Sequence[Any],
    grid_type: str = "",
    *,
    grid_offset: float = 0.0,
    grid_indexing: str = "ij",
    normalize_coords: str = "",
    ndim: int = 2,
) -> torch.Tensor:
    """(h, w, 2) places of patches in [-1, 1], as timm's rotary embedding of DINOv3 has them; in a trace, sizes are tensors."""
    if (grid_type, grid_indexing, normalize_coords, len(feat_shape)) != (
        "centered",
        "ij",
        "separate",
        ndim,
    ):
        raise EmadaptError(
            f"a rotary embedding of another kind ({grid_type}, {normalize_coords}) cannot be exported"
        )
    places = [
        (torch.arange(n, dtype=torch.float32) + 0.5 + grid_offset) / torch.as_tensor(n)
        for n in feat_shape
    ]
    return 2 * torch.stack(torch.meshgrid(places, indexing="ij"), -1) - 1


def bicubic(n_in: int, n_out: Any) -> torch.Tensor:
    """(n_out, n_in) weights of torch's and Pillow's bicubic filter with antialiasing (Keys 1981, a = -0.5)."""
    scale = n_in / torch.as_tensor(n_out, dtype=torch.float32)
    centre = (torch.arange(n_out, dtype=torch.float32) + 0.5) * scale
    x = (
        (torch.arange(n_in, dtype=torch.float32) + 0.5)[None] - centre[:, None]
    ).abs() / scale.clamp(min=1.0)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(1, keepdim=True)


def probe(n: int, height: int, width: int, seed: int) -> np.ndarray:
    """(n, 1, height, width) float32 grey values from 0 to 255 with structure at all scales: what a constant cannot pass for."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    images = sum(
        ndimage.gaussian_filter(rng.normal(size=(n, 1, height, width)), (0, 0, s, s)) * s
        for s in (1, 4, 16)
    )
    low, high = np.min(images), np.max(images)
    return np.rint((images - low) / (high - low) * 255).astype(np.float32)


def _trace(whole: nn.Module, model: Model, path: Path) -> None:
    patch = model.segmenter.backbone.arch.patch
    image = torch.from_numpy(probe(TRACED[0], TRACED[1] * patch, TRACED[2] * patch, 0))
    dynamic = {0: "n", 2: "height", 3: "width"}
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        mock.patch(RESAMPLE, resampled),
        mock.patch(ROTARY, centred),
    ):
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


def documentation(model: Model) -> str:
    """The model card, and how to feed the graph."""
    facts = "\n".join(f"- {name}: {value}" for name, value in described(model).items())
    return f"{card_of(model.folder, model.card, with_backbone=True)}\n## Input and output of the graph\n\n{facts}\n"


def described(model: Model) -> dict[str, str]:
    """What a user of the graph must know, by name."""
    tensors, _ = sha256_of(model.folder)
    return {
        "unit": model.name,
        "input": "float32 grey values 0 (black) to 255 (white), as in an 8-bit image; map others linearly to that first",
        "sides": f"multiples of {model.segmenter.backbone.arch.patch} pixels",
        "pixel_nm": json.dumps(pixels_of(model)),
        "threshold": str(model.card["threshold"]),
        "smooth_z_nm": str(model.segmenter.spec.smooth_z_nm),
        "flips": str(model.segmenter.spec.flips).lower(),
        "terms": "; ".join(terms_of(model.card, with_backbone=True)),
        "model_sha256": tensors,
    }


def pixels_of(model: Model) -> dict[str, tuple[float, float]]:
    """Size (y, x) in nm of the pixels that the network sees, for each dataset that it was trained on."""
    spec, out = model.segmenter.spec, {}
    reference = model.card.get("align", {}).get(
        "reference"
    )  # `align: voxel` brought all to that size
    for name, voxel in model.voxels.items():
        scale = (
            spec.longest_edge / max(model.card["shape"][name][1:])
            if spec.longest_edge
            else spec.scale
        )
        y, x = (reference["voxel_nm"] if reference else voxel)[1:]
        out[name] = (round(y / scale, 4), round(x / scale, 4))
    return out


def _differences(whole: nn.Module, path: Path, patch: int) -> dict[str, float]:
    session, found = open_session(path), {}
    for seed, (n, rows, columns) in enumerate(CHECKED, 1):
        image = probe(n, rows * patch, columns * patch, seed)
        with torch.inference_mode():
            expected = whole(torch.from_numpy(image)).numpy()
        given = session.run([OUTPUT], {INPUT: image})[0]
        away = (
            float(np.abs(given - expected).max()) if given.shape == expected.shape else float("inf")
        )
        found[" x ".join(map(str, (n, *image.shape[2:])))] = away
    if not all(away <= TOLERANCE for away in found.values()):  # so that NaN is refused, too
        raise EmadaptError(
            f"the ONNX graph differs from the model by {max(found.values()):.3g} in probability ({found}), allowed"
            f" is {TOLERANCE:g}; nothing was written. Please report it with the model's model.json."
        )
    return found


def open_session(path: Path) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        InputError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            "onnxruntime",
            found="not installed",
            expected="it, to check what is exported",
            do="pip install 'emadapt[export]'",
        ) from error
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
