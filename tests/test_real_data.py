"""The real Lucchi and VNC volumes through the real study's settings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import jaccard_score
from sklearn.preprocessing import StandardScaler

from emadapt.data.crops import as_input
from emadapt.data.ingest import ingest, open_volume
from emadapt.models.backbones import Backbone
from emadapt.models.tokens import compute_tokens
from emadapt.study.loading import load_study
from tiny import build_backbone

pytestmark = pytest.mark.real_data
STUDY = Path(__file__).parents[1] / "studies/adapt/study.yaml"


def test_the_real_volumes_pass_ingest_with_the_split_that_the_study_states(
    tmp_path: Path, real_data: Path
) -> None:
    study = load_study(STUDY)
    for name, shape, test in (
        ("lucchi", [96, 768, 1024], list(range(64, 96))),
        ("vnc", [20, 1024, 1024], [16, 17, 18, 19]),
    ):
        ingest(study, name, real_data, tmp_path)
        volume = open_volume(name, tmp_path)
        assert volume.manifest["shape"] == shape
        assert volume.split["test"] == test
        # three of VNC's labels have 1 bit a pixel, the others 8
        shares = np.asarray(volume.label).mean((1, 2))
        assert 0.03 < shares.min() < shares.max() < 0.1
        known = volume.manifest["intensity"]
        assert (known["low"], known["high"]) == (0, 255), "8 bits stay as they are"


def test_pretrained_tokens_hold_mitochondria_and_random_ones_hardly(
    tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ridge probe on patch tokens of VNC, sections 0 to 9 against 12 to 19, threshold at the true
    share of foreground."""
    ingest(load_study(STUDY), "vnc", real_data, tmp_path)
    volume = open_volume("vnc", tmp_path)
    monkeypatch.chdir(tmp_path)  # converted weights are kept in the working directory

    def patches(backbone: Backbone, slices: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        features, labels = [], []
        for z in slices:
            image, label = (np.asarray(a[z, :518, :518]) for a in (volume.image, volume.label))
            tokens = compute_tokens(backbone, as_input(image)[None], "fp32")[0][0]  # D,37,37
            features.append(tokens.flatten(1).T.numpy())
            labels.append(
                torch.nn.functional.avg_pool2d(torch.tensor(label).float()[None], 14)
                .numpy()
                .ravel()
                > 0.5
            )
        return np.concatenate(features), np.concatenate(labels)

    def probe(source: str) -> float:
        backbone = build_backbone("dinov2_s", source, blocks=(6,))
        (x, y), (x_test, y_test) = (
            patches(backbone, (0, 3, 6, 9)),
            patches(backbone, (12, 15, 17, 19)),
        )
        scale = StandardScaler().fit(x)
        score = (
            Ridge(alpha=100.0)
            .fit(scale.transform(x), y.astype(float))
            .predict(scale.transform(x_test))
        )
        return float(jaccard_score(y_test, score > np.quantile(score, 1 - y_test.mean())))

    pretrained, random = probe("pypi"), probe("random")
    print(f"patch IoU of a ridge probe on VNC: pretrained {pretrained:.3f}, random {random:.3f}")
    assert pretrained > 0.4
    assert pretrained > 1.5 * random
