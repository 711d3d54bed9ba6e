"""SAM 2 as a baseline: its prompts, what it keeps, and a study with it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from emadapt.data.ingest import Volume
from emadapt.errors import InputError
from emadapt.models import sam2
from emadapt.models.predict import predict_slices
from emadapt.models.segmenter import Segmenter
from emadapt.pipeline.check import check_study
from emadapt.report.recommend import recommend
from emadapt.report.report import build_report
from emadapt.segment.model import open_model
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import regime_settings
from emadapt.study.study import Unit
from emadapt.training.costs import cost_of
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.model_files import load_model
from emadapt.training.train import train_unit
from outside import scene, write_sam2
from tiny import TINY, build_model, make_study, predict_slice, settings

SPEC = BackboneSettings(**TINY | {"tile": 64})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sam2(tmp_path_factory.mktemp("sam2"))


def a_segmenter(folder: Path, prompts: Any = "automatic") -> Segmenter:
    settings = regime_settings(kind="sam2", weights=str(folder), prompts=prompts)
    return build_model(SPEC, settings, "sam2").eval()


def prompted(segmenter: Segmenter, image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Probability of foreground of a slice, the prompts made of its label."""
    volume = Volume("v", image[None], label[None].astype(np.uint8), {"voxel_nm": [1, 1, 1]})
    [(_, found)] = predict_slices(segmenter, volume, [0])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_those_of_the_connected_components(seed: int) -> None:
    from skimage.measure import label as numbered
    from skimage.measure import regionprops

    _, label = scene(seed)
    objects, boxes = sam2.objects_of(label)
    regions = regionprops(numbered(label, connectivity=1))
    assert len(boxes) == len(regions) > 1
    assert {tuple(box) for box in boxes} == {
        (r.bbox[1], r.bbox[0], r.bbox[3] - 1, r.bbox[2] - 1) for r in regions
    }
    for number, (x0, y0, x1, y1) in enumerate(boxes.astype(int), 1):
        ys, xs = np.nonzero(objects == number)
        assert (xs.min(), ys.min(), xs.max(), ys.max()) == (x0, y0, x1, y1)


class Discs(nn.Module):
    """Answers a point with three discs around it, whose sizes, steepness and predicted IoU differ
    from point to point."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def get_image_embeddings(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return [pixels]

    def forward(self, image_embeddings: Any, input_points: torch.Tensor) -> Any:
        centres = input_points[0]  # n,1,2
        drawn = [
            torch.sin(centres @ torch.tensor([7.3, 3.1]) * k + torch.arange(3.0)).abs()
            for k in (1, 2, 5)
        ]
        ys, xs = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        away = torch.hypot(xs - centres[..., :1, None], ys - centres[..., 1:, None])[:, :1]
        logits = (3 + 12 * drawn[0][..., None, None] - away) * (0.2 + 2 * drawn[1][..., None, None])
        return SimpleNamespace(pred_masks=logits[None], iou_scores=drawn[2][None])


def test_automatic_keeps_the_masks_that_transformers_keeps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its filters and non-maximum suppression, on run-length codes, are other code."""
    for name, value in (("POINTS", 8), ("PREDICTED_IOU", 0.3), ("STABILITY", 0.6)):
        monkeypatch.setattr(sam2, name, value)
    backbone: Any = a_segmenter(folder).backbone
    backbone.network, tool = Discs(), backbone.processor.image_processor
    image, _ = scene()
    points = torch.from_numpy(sam2.grid((90, 120), 8) * np.asarray([64 / 120, 64 / 90], np.float32))
    out = backbone.network(None, points[None, :, None])
    native = backbone.processor.post_process_masks(out.pred_masks, [[90, 120]], binarize=False)[0]
    codes, scores, boxes = tool.filter_masks(
        native, out.iou_scores[0], (90, 120), [0, 0, 120, 90], 0.3, 0.6
    )
    masks, *_ = tool.post_process_for_mask_generation(codes, scores, boxes, sam2.OVERLAP)
    # The filters and the suppression all do something.
    assert 3 < len(masks) < len(codes) < 3 * len(points)
    found = list(backbone._automatic(backbone.network.get_image_embeddings(native), (90, 120)))
    assert len(found) == len(masks)
    for mask in masks:
        same = [np.mean((own[0] > 0).numpy() == np.asarray(mask, bool)) for own in found]
        assert max(same) > 0.999
    union = torch.stack([torch.as_tensor(mask) for mask in masks]).any(0)
    assert ((backbone.union(image, None) > 0) == union).float().mean() > 0.999


class Perfect(nn.Module):
    """Answers a box with the box, or with what the mask prompt has in it."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.nothing = side, nn.Parameter(torch.zeros(1))

    def get_image_embeddings(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        assert pixels.shape == (1, 3, self.side, self.side)
        return [pixels]

    def forward(
        self,
        image_embeddings: Any,
        multimask_output: bool,
        input_boxes: torch.Tensor,
        input_masks: torch.Tensor | None = None,
    ) -> Any:
        assert not multimask_output
        across = torch.arange(self.side)
        masks = []
        for x0, y0, x1, y1 in input_boxes[0]:
            rows, columns = (across >= y0) & (across < y1 + 1), (across >= x0) & (across < x1 + 1)
            masks.append(rows[:, None] & columns)
        found = torch.stack(masks)[None, :, None].float() * 2 - 1
        if input_masks is not None:
            assert found.shape[1] == 1
            found = torch.minimum(found, input_masks[None])
        return SimpleNamespace(pred_masks=found)


@pytest.mark.parametrize("prompts", ["box", "box+mask"])
def test_with_a_perfect_network_the_prompted_foreground_is_the_label(
    folder: Path, prompts: str
) -> None:
    segmenter = a_segmenter(folder, prompts)
    segmenter.backbone.network = Perfect(64)
    label = np.zeros((64, 64), bool)
    label[3:20, 5:9], label[30:50, 40:64], label[62:, :2] = True, True, True
    if prompts == "box+mask":  # these are not their boxes, and a box holds a part of another object
        label[10:14, 7:30] = True
        label[22:30, 2:3] = label[22:23, 2:20] = label[25:27, 10:14] = True
    assert np.array_equal(prompted(segmenter, np.zeros((64, 64), np.uint8), label) > 0.5, label)


def test_without_labels_only_automatic_prompts_answer(folder: Path) -> None:
    image, _ = scene()
    found = predict_slice(a_segmenter(folder), image)
    assert (found.shape, found.dtype) == (image.shape, np.float32)
    with pytest.raises(InputError, match=r"images without labels.*automatic"):
        predict_slice(a_segmenter(folder, "box"), image)


@pytest.mark.slow
def test_sam2_in_the_grid_of_a_study(
    folder: Path, tmp_path: Path, tracking_off: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("POINTS", 3), ("PREDICTED_IOU", 0.0), ("STABILITY", 0.0)):
        monkeypatch.setattr(sam2, name, value)
    params = settings()
    kinds = {"sam2": "automatic", "sam2_oracle_box": "box", "sam2_oracle_both": "box+mask"}
    params["regimes"] = {
        name: {"kind": "sam2", "weights": str(folder), "prompts": how}
        for name, how in kinds.items()
    }
    params["study"] |= {"regimes": list(kinds), "train_sets": ["a"]}
    study = make_study(tmp_path, params)
    assert check_study(tmp_path / "params.yaml") == []
    for unit in study.units():
        trained = train_unit(study, unit)
        assert (trained / "model.safetensors").stat().st_size < 1000  # nothing was trained
        card = json.loads((trained / "model.json").read_text())
        assert card["weights"]["sha256"] == sam2.sha256_of(folder / "model.safetensors")
        metrics = json.loads(evaluate_unit(study, unit).read_text())
        assert (metrics["trainable_params"], cost_of(card["key"])["seconds"]) == (0, 0)
        told = (tmp_path / "build/evaluate" / unit.name / "model-card.md").read_text()
        assert ("an oracle: prompted from the labels" in told) == (unit.regime != "sam2")
        assert "the published system SAM 2" in told
        assert "DINOv2" not in told
        if unit.regime != "sam2":
            image, label = (np.load(f"build/ingest/b/{kind}.npy")[9] for kind in ("image", "label"))
            segmenter: Any = load_model(trained)[0]
            found = prompted(segmenter, image, label > 0) > 0.5
            iou = (found & (label > 0)).sum() / (found | (label > 0)).sum()
            assert iou == pytest.approx(metrics["test"]["b"]["per_slice"]["iou"][-1], abs=1e-6)
            with pytest.raises(InputError, match="needs labels for its prompts"):
                open_model(trained)
    build_report(tmp_path, study)
    board = (tmp_path / "reports/leaderboard.md").read_text()
    assert board.count("| label prompts |") == 4
    assert board.count("| zero-shot |") == 2
    assert "Best: sam2, not trained" in " ".join(recommend(tmp_path, study, ["a"]))


def test_other_weights_than_it_was_scored_with_are_refused(
    tmp_path: Path, tracking_off: None
) -> None:
    other = write_sam2(tmp_path / "weights")
    params = settings()
    params["regimes"] = {"sam2_oracle": {"kind": "sam2", "weights": str(other), "prompts": "box"}}
    params["study"] |= {"regimes": ["sam2_oracle"], "train_sets": ["a"]}
    trained = train_unit(make_study(tmp_path, params), Unit("t", "sam2_oracle", "a", 0))
    network = sam2._load(other)[0]
    with torch.no_grad():
        network.no_memory_embedding.add_(1)
    network.save_pretrained(other)
    with pytest.raises(InputError, match="which it was trained on"):
        load_model(trained)
