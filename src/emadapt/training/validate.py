"""IoU of a model on validation slices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from emadapt.data.foreground import masks_of, most_probable
from emadapt.data.ingest import Volume
from emadapt.data.splits import evenly_spaced
from emadapt.metrics.classification import auroc
from emadapt.models import parallel
from emadapt.models.classifier import Classifier
from emadapt.models.predict import Probability, predict_slices
from emadapt.training.inputs import Inputs
from emadapt.training.objective import Loss


def validate(
    inputs: Inputs, every: int, loss_of: Loss | None = None, threshold: float = 0.5
) -> dict[str, float]:
    """`iou`, the mean over datasets; `iou.<dataset>`; `loss` if it is asked for.

    Of several classes the IoU of a dataset is the mean over them, with `iou.<dataset>.<class>`.
    Of whole images `auroc` instead, of all validation images.

    Args:
        inputs: of the unit.
        every: validation slices of each dataset that are scored, without overlap of tiles; 0: all,
            as in evaluation.
        loss_of: of logits and labels; it is given the logarithms of probabilities.
        threshold: of the masks of a model of one class.
    """
    inputs.segmenter.eval()
    if isinstance(inputs.segmenter, Classifier):
        return _of_images(inputs, inputs.segmenter, loss_of)
    losses: list[float] = []
    ious: dict[str, float] = {}
    by_class: dict[str, float] = {}
    for number, volume in enumerate(inputs.volumes):
        slices, classes = val_slices(volume, every, inputs.segmenter.depth), volume.scored
        # Pixels of each class that are hit, and in either; the loss.
        counts = torch.zeros((len(slices), 2 * len(classes) + 1), dtype=torch.float64)
        for k, probability in _shared_out(inputs, number, slices, quick=bool(every)):
            label, known = volume.truth(slices[k])
            found = masks_of(most_probable(probability, threshold), len(classes)) & known
            masks = np.stack([label & found, label | found]).reshape(2 * len(classes), -1)
            counts[k, :-1] = torch.from_numpy(masks.sum(1))
            if loss_of:
                counts[k, -1] = _loss(loss_of, probability, volume.label[slices[k]])
        counts = parallel.total(counts)
        hits, either = counts[:, :-1].sum(0).view(2, -1).tolist()
        own = [a / b if b else 1.0 for a, b in zip(hits, either, strict=True)]
        ious[f"iou.{volume.name}"] = float(np.mean(own))
        if len(classes) > 1:
            names = [f"iou.{volume.name}.{name}" for name in classes]
            by_class |= dict(zip(names, own, strict=True))
        losses += counts[:, -1].tolist()
    scores = {"iou": float(np.mean(list(ious.values()))), **ious, **by_class}
    return scores | ({"loss": float(np.mean(losses))} if loss_of else {})


def _of_images(inputs: Inputs, classifier: Classifier, loss_of: Loss | None) -> dict[str, float]:
    scores, losses = {}, []
    for number, volume in enumerate(inputs.volumes):
        images = volume.split["val"]
        found = classifier.classify(volume, images, inputs.view(number))
        truth = np.asarray(volume.label[images], np.int64)  # n,1,1
        scores[f"auroc.{volume.name}"] = auroc(truth.ravel(), found)[0]
        if loss_of:
            logits = torch.from_numpy(found).clamp_min(1e-6).log()[..., None, None]
            losses.append(float(loss_of(logits, torch.from_numpy(truth)[:, None])))
    scores = {"auroc": float(np.mean(list(scores.values()))), **scores}
    return scores | ({"loss": float(np.mean(losses))} if loss_of else {})


def val_slices(volume: Volume, every: int, depth: int = 1) -> list[int]:
    """`every` validation slices spread over the block, or all of them for 0.

    For a model of blocks, neighbours from the middle: `every`, and at least its `depth`.
    """
    slices = volume.split["val"]
    if every and depth > 1:
        n = min(max(every, depth), len(slices))
        first = (len(slices) - n) // 2
        return slices[first : first + n]
    return [slices[k] for k in evenly_spaced(len(slices), every or len(slices))]


def _shared_out(
    inputs: Inputs, number: int, slices: list[int], *, quick: bool
) -> Iterator[tuple[int, Probability]]:
    """Places in `slices` and probabilities, of the slices that fall to this process."""
    segmenter, volume = inputs.segmenter, inputs.volumes[number]
    mine = range(parallel.rank(), len(slices), parallel.size())
    # Models of blocks and smoothing along z need the neighbours, so all are predicted.
    together = segmenter.depth > 1 or (segmenter.spec.smooth_z_nm and not quick)
    shown = range(len(slices)) if together else mine
    predicted = predict_slices(
        segmenter,
        volume,
        [slices[k] for k in shown],
        inputs.view(number),
        overlap=0.0 if quick else None,
        smoothed=not quick,
    )
    for k, (_, probability) in zip(shown, predicted, strict=True):
        if k in mine:
            yield k, probability


def _loss(loss_of: Loss, probability: Probability, label: np.ndarray) -> float:
    p = torch.tensor(probability).clamp(1e-6, 1 - 1e-6).view(-1, *label.shape)
    background = (1 - p.sum(0, keepdim=True)).clamp_min(1e-6)
    logits = torch.cat([background, p]).log()[None]
    return float(loss_of(logits, torch.from_numpy(label.astype(np.int64))[None, None]))
