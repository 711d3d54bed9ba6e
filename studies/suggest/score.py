"""Which slices to label next? `python studies/suggest/score.py` compares four ways to choose them.

A ridge regression on the tokens of the labelled slices says which tokens of the test slices are
foreground. It has a closed form, so each choice of slices costs a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import linalg

from emadapt import api
from emadapt.data.ingest import open_volume
from emadapt.data.splits import evenly_spaced
from emadapt.models.backbones import pretrained
from emadapt.models.ridge import Sums, sums_of
from emadapt.models.tokens import TokenView, token_views
from emadapt.training.regimes.at_once import tokens_and_classes

RESULTS = Path(__file__).parent / "results"
MOST, REPEATS, STRENGTH = 8, 10, 1e-2
CANDIDATES, TESTED = 48, 16
"""Slices to choose from and to score, at most, evenly spaced."""

Floats = npt.NDArray[np.float32]


@dataclass
class Data:
    """Tokens of a dataset, by slice."""

    tokens: list[Floats]  # (n, D) of each candidate slice
    classes: list[Floats]  # (n,) of its tokens, 0 or 1
    sums: list[Sums]
    test: Floats
    truth: Floats

    def score(self, chosen: list[int]) -> float:
        """IoU on the test tokens of a model that knows the labels of these slices."""
        weights, offset, threshold = self.fitted(chosen)
        return iou(self.test @ weights + offset > threshold, self.truth > 0)

    def fitted(self, chosen: list[int]) -> tuple[Floats, float, float]:
        """Weights, offset, and the threshold that suits the labelled slices best."""
        total = self.sums[chosen[0]]
        for z in chosen[1:]:
            total = total + self.sums[z]
        weights, offset = ridge(total)
        scores = np.concatenate([self.tokens[z] for z in chosen]) @ weights + offset
        truth = np.concatenate([self.classes[z] for z in chosen]) > 0
        threshold = max(np.arange(0.1, 0.6, 0.02), key=lambda t: iou(scores > t, truth))
        return weights, offset, float(threshold)


def ridge(sums: Sums) -> tuple[Floats, float]:
    """As `models.ridge.solve` with one strength, but ten times as fast: weights and offset."""
    mean, target = sums.x / sums.n, sums.y / sums.n
    gram = sums.xx / sums.n - np.outer(mean, mean)
    scale = np.sqrt(np.diag(gram) + 1e-5)
    gram = gram / np.outer(scale, scale) + STRENGTH * np.eye(len(mean))
    slopes = linalg.solve(gram, (sums.xy / sums.n - mean * target) / scale, assume_a="pos") / scale
    return slopes.astype(np.float32), float(target - slopes @ mean)


def iou(found: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """Of tokens."""
    return float((found & truth).sum() / max(1, (found | truth).sum()))


def read(name: str) -> Data:
    """Tokens of candidates and of test slices, from the cache."""
    study = api.load_study()
    spec = study.backbone_settings["dinov2_s"]
    volume = open_volume(name)
    (view,) = token_views(pretrained(spec), spec, volume, range(1))
    train, test = volume.split["train"], volume.split["test"]
    pairs = [of_slice(view, train[k]) for k in evenly_spaced(len(train), CANDIDATES)]
    tested = [of_slice(view, test[k]) for k in evenly_spaced(len(test), TESTED)]
    tokens, classes = zip(*pairs, strict=True)
    sums = [sums_of(x, y) for x, y in pairs]
    x, y = (np.concatenate(part) for part in zip(*tested, strict=True))
    return Data(list(tokens), list(classes), sums, x, y)


def of_slice(view: TokenView, z: int) -> tuple[Floats, Floats]:
    """Tokens (n, D) of a slice and their classes (n,)."""
    tokens, classes = tokens_and_classes(view, view.rows_of_slice(z))
    return tokens.astype(np.float32), classes


def even(data: Data, rng: np.random.Generator) -> list[list[int]]:
    """Evenly spaced, from a random place on."""
    start, length = rng.uniform(), len(data.sums)
    return [[int((k + start) * length / n) for k in range(n)] for n in range(1, MOST + 1)]


def random(data: Data, rng: np.random.Generator) -> list[list[int]]:
    """Any."""
    return growing([int(z) for z in rng.permutation(len(data.sums))[:MOST]])


def covering(data: Data, rng: np.random.Generator) -> list[list[int]]:
    """The slice whose tokens are farthest from those chosen (k-centre, Sener & Savarese 2018)."""
    moments = np.stack([np.r_[x.mean(0), x.std(0)] for x in data.tokens])
    moments = (moments - moments.mean(0)) / (moments.std(0) + 1e-6)
    chosen = [int(rng.integers(len(moments)))]
    while len(chosen) < MOST:
        away = np.linalg.norm(moments[:, None] - moments[chosen], axis=2).min(1)
        chosen.append(int(away.argmax()))
    return growing(chosen)


def doubtful(data: Data, rng: np.random.Generator) -> list[list[int]]:
    """The slice with most tokens that the model of the chosen ones is not sure of."""
    chosen = [int(rng.integers(len(data.sums)))]
    while len(chosen) < MOST:
        weights, offset, threshold = data.fitted(chosen)
        doubts = [float((abs(x @ weights + offset - threshold) < 0.1).mean()) for x in data.tokens]
        chosen.append(max(set(range(len(doubts))) - set(chosen), key=lambda z: doubts[z]))
    return growing(chosen)


def growing(chosen: list[int]) -> list[list[int]]:
    """The first, the first two, ..."""
    return [chosen[:n] for n in range(1, len(chosen) + 1)]


WAYS: dict[str, Callable[[Data, np.random.Generator], list[list[int]]]] = {
    "evenly spaced": even,
    "random": random,
    "covering the tokens": covering,
    "most doubtful": doubtful,
}
"""Way -> the slices to label, one to `MOST` of them."""


def main() -> None:
    """Score each way with 1 to 8 slices, ten times."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for name in ("lucchi", "vnc"):
        data = read(name)
        found[name] = {"all": [[data.score(list(range(len(data.sums))))]]}
        for way, choose in WAYS.items():
            draws = [choose(data, np.random.default_rng(repeat)) for repeat in range(REPEATS)]
            found[name][way] = [[data.score(chosen) for chosen in draw] for draw in draws]
            print(f"{name}, {way}: {np.round(np.mean(found[name][way], 0), 3)}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scores.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
