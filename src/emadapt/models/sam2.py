"""SAM 2 (Ravi et al. 2024, arXiv 2408.00714) through `transformers`, not trained.

`automatic` asks at a grid of points and keeps the masks that are predicted to be good, stable and
no duplicates, as the automatic mask generator of its authors does, with its settings. SAM 2 knows
no classes: the union of all masks holds whatever looks like an object. `box` and `box+mask` are
oracles: the prompts are made of the labels that the result is scored on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emadapt.data.ingest import Volume
from emadapt.data.tiles import Geometry, Grey
from emadapt.errors import InputError
from emadapt.files import sha256_of
from emadapt.models.hub import hub_file
from emadapt.models.published import Published, check_package, two_classes
from emadapt.models.segmenter import Probability, Segmenter
from emadapt.models.weights import Provenance

Mask = npt.NDArray[np.bool_]

FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
POINTS = 32
"""Points along each side of the grid."""
AT_ONCE = 32
"""Prompts that are decoded at once."""
PREDICTED_IOU, STABILITY, OFFSET, OVERLAP = 0.8, 0.95, 1.0, 0.7
"""Limits on a mask's predicted IoU, its stability and its overlap with better masks."""
CERTAIN = float(np.log((1 - 1e-3) / 1e-3))
"""Logit inside an object in a mask prompt, negative outside (Archit et al. 2025)."""
NOTHING = -20.0
"""Logit where there is no mask."""
DO = (
    "Download facebook/sam2.1-hiera-tiny (or -small, -base-plus, -large) with "
    "`hf download facebook/sam2.1-hiera-tiny --local-dir DIR` and give DIR as `weights` of the "
    "regime, or the repository's name where the hub can be reached."
)


class Sam2(Published):
    """Sam2Model with weights of a folder or a repository of the hub.

    Args:
        weights: the folder or the repository.
        prompts: `automatic`, `box` or `box+mask`.

    Raises:
        InputError: no package, or weights that cannot be had or do not fit.
    """

    network: Any

    def __init__(self, weights: str, prompts: str) -> None:
        check_package("sam2")
        folder, source = folder_of(weights)
        network, processor = _load(folder)
        sha256 = sha256_of(folder / "model.safetensors")
        provenance = Provenance(source, weights, sha256, "SAM 2, Sam2Model")
        super().__init__("sam2", 1, network, provenance)
        self.prompts = prompts
        self.processor: Any = processor

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 1, H, W) in [0, 1] -> one (B, 2, H, W) of logits, from automatic prompts."""
        grey = (images[:, 0] * 255).round().byte().cpu().numpy()
        return [two_classes(torch.stack([self.union(image, None)[None] for image in grey]))]

    @torch.inference_mode()
    def union(self, image: Grey, label: Mask | None) -> torch.Tensor:
        """Logits (Y, X): at each pixel the largest over all masks."""
        size = (image.shape[0], image.shape[1])
        device = next(self.network.parameters()).device
        total = torch.full(size, NOTHING, device=device)
        with torch.autocast(device.type, enabled=False):
            found = self.processor(images=np.stack([image] * 3, -1), return_tensors="pt")
            seen = self.network.get_image_embeddings(found["pixel_values"].to(device))
            masks = self._automatic(seen, size) if label is None else self._of_objects(seen, label)
            for some in masks:
                total = torch.maximum(total, some.amax(0))
        return total

    def _of_objects(self, seen: list[torch.Tensor], label: Mask) -> Iterator[torch.Tensor]:
        """Logits (n, Y, X) of the masks of some objects at a time, prompted by box or mask."""
        objects, boxes = objects_of(label)
        step = AT_ONCE if self.prompts == "box" else 1  # a mask prompt is one for all boxes
        for start in range(0, len(boxes), step):
            some = torch.from_numpy(boxes[None, start : start + step])
            prompts = self._placed(label.shape, input_boxes=some)
            if self.prompts == "box+mask":
                inside = np.where(objects == start + 1, CERTAIN, -CERTAIN).astype(np.float32)
                mask = torch.from_numpy(inside)[None, None]
                prompts["input_masks"] = mask.to(seen[0].device)
            out = self.network(image_embeddings=seen, multimask_output=False, **prompts)
            yield self._at_native(out.pred_masks[0], label.shape)[:, 0]

    def _automatic(self, seen: list[torch.Tensor], size: tuple[int, int]) -> Iterator[torch.Tensor]:
        """Logits (1, Y, X) of each mask that is kept, one at a time."""
        from torchvision.ops import masks_to_boxes, nms

        points, kept, boxes, scores = torch.from_numpy(grid(size, POINTS)), [], [], []
        for some in points.split(AT_ONCE):
            prompts = self._placed(size, input_points=some[None, :, None])
            out = self.network(image_embeddings=seen, **prompts)
            masks, predicted = out.pred_masks[0].flatten(0, 1), out.iou_scores[0].flatten()
            likely = predicted > PREDICTED_IOU
            masks, predicted = masks[likely], predicted[likely]
            native = self._at_native(masks[:, None], size)[:, 0]
            good = (stability(native) > STABILITY) & (native > 0).flatten(1).any(1)
            kept.append(masks[good])
            scores.append(predicted[good])
            boxes.append(masks_to_boxes(native[good] > 0))
        for i in nms(torch.cat(boxes), torch.cat(scores), OVERLAP):
            yield self._at_native(torch.cat(kept)[i][None, None], size)[:, 0]

    def _placed(self, size: tuple[int, ...], **prompts: torch.Tensor) -> dict[str, torch.Tensor]:
        """Prompts in pixels of the slice -> in those of what the network sees, on its device."""
        placed = self.processor(original_sizes=torch.tensor([size]), return_tensors="pt", **prompts)
        return {name: placed[name].to(next(self.network.parameters()).device) for name in prompts}

    def _at_native(self, masks: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """Logits (n, m, h, w) -> (n, m, Y, X)."""
        if not len(masks):
            return masks.new_zeros(0, masks.shape[1], *size)
        found = self.processor.post_process_masks(masks[None], [list(size)], binarize=False)
        return torch.as_tensor(found[0])


class PromptedSegmenter(Segmenter):
    """SAM 2 prompted from the labels that it is scored on, which it sees with each slice."""

    needs_labels = True

    def shown(self, volume: Volume, z: int, geo: Geometry) -> Grey:
        """(Y, X, 2): the slice, and 1 where its label is foreground."""
        label, _ = volume.truth(z)
        image = geo.aligner(np.asarray(volume.image[z]))
        return np.stack([image, label.astype(np.uint8)], -1)

    def slab(self, shown: Grey, geo: Geometry, overlap: float | None = None) -> Probability:
        if shown.ndim == 3:
            raise InputError(
                f"SAM 2 with `prompts: {self.backbone.prompts}`",
                found="images without labels",
                expected="labels, of which its prompts are made",
                do="Use `prompts: automatic`.",
            )
        logits = self.backbone.union(shown[0, ..., 0], shown[0, ..., 1] > 0)
        return np.asarray(logits.sigmoid().cpu().numpy())[None]


def objects_of(label: Mask) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Components of a slice, numbered from 1 (Y, X), and their boxes (n, 4): x0, y0, x1, y1."""
    from scipy import ndimage

    objects, _ = ndimage.label(label)
    found = ndimage.find_objects(objects)
    boxes = [(xs.start, ys.start, xs.stop - 1, ys.stop - 1) for ys, xs in found]
    return objects, np.asarray(boxes, np.float32).reshape(-1, 4)


def grid(size: tuple[int, int], n: int) -> npt.NDArray[np.float32]:
    """Middles (x, y) of n x n equal parts of a slice (height, width): (n * n, 2)."""
    ys, xs = ((np.arange(n) + 0.5) / n * side for side in size)
    return np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2).astype(np.float32)


def stability(logits: torch.Tensor) -> torch.Tensor:
    """Area of masks (n, Y, X) at a high threshold as a share of that at a low one: (n,)."""
    inner, outer = ((logits > at).flatten(1).sum(1) for at in (OFFSET, -OFFSET))
    return inner / outer.clamp_min(1)


def folder_of(weights: str, of_hub: tuple[str, ...] = FILES) -> tuple[Path, str]:
    """The folder with a model's files, and its source: `file` or `hub`.

    Raises:
        InputError: no such folder, files missing in it, or no such repository to be had.
    """
    folder = Path(weights)
    if folder.is_dir():
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise _no_model(weights, f"a folder without {', '.join(missing)}")
        return folder, "file"
    if folder.is_absolute() or weights.count("/") != 1 or weights.startswith("."):
        raise _no_model(weights, "no such folder")
    try:
        return [hub_file(weights, (name,)) for name in of_hub][-1].parent, "hub"
    except InputError as error:
        raise _no_model(weights, f"no such folder, and {error.found}") from error


def _no_model(weights: str | Path, found: str) -> InputError:
    return InputError(
        f"weights {weights} of regime sam2",
        found=found,
        expected=f"a model of SAM 2 as transformers saves it: {', '.join(FILES)}",
        do=DO,
    )


def check(weights: str) -> None:
    """Raise what building it would raise, as far as package and files show it."""
    check_package("sam2")
    folder_of(weights, FILES[:1])


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import Sam2ImageProcessor, Sam2Model, Sam2Processor
    from transformers.utils import logging

    logging.disable_progress_bar()
    read: Any = Sam2Model.from_pretrained
    options = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
    try:
        network, loaded = read(folder, output_loading_info=True, **options)
        processor = Sam2Processor(Sam2ImageProcessor.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # transformers raises what the readers of the files raise
        said = " ".join(str(error).split())[:200]
        raise _no_model(folder, f"a model that cannot be read ({said})") from error
    if missing := sorted(loaded["missing_keys"]):
        raise _no_model(folder, f"{len(missing)} tensors missing, e.g. {missing[0]}")
    return network.eval(), processor
