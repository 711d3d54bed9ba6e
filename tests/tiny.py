"""Small volumes and studies that the tests run the real pipeline on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from safetensors.torch import save_file

import emadapt
from emadapt.data.align import AS_IT_IS, Aligner
from emadapt.data.ingest import Volume, ingest
from emadapt.data.tiles import Grey, geometry, to_input, to_native
from emadapt.models.backbones import Backbone
from emadapt.models.predict import predict_slices
from emadapt.models.segmenter import Probability, Segmenter
from emadapt.models.weights import Provenance, open_weights
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import ONE_CLASS
from emadapt.study.loading import load_study
from emadapt.study.regimes import RegimeSettings, regime_settings
from emadapt.study.study import Study, Unit
from emadapt.training.fit import Run
from emadapt.training.model_files import load_model, save_model
from emadapt.training.regimes import REGIMES
from emadapt.training.regimes.regime import Regime
from emadapt.training.train import train_unit

TINY: dict[str, Any] = {
    **{"arch": "tiny_dinov2", "source": "random", "tile": 56},
    **{"overlap": 0.25, "views": 0, "precision": "fp32"},
}
"""Settings of a small backbone."""


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def weights_spec(
    arch: str, source: str = "random", file: Path | str = "", **options: Any
) -> BackboneSettings:
    """Settings of a backbone as far as its weights go."""
    return BackboneSettings.model_validate(
        {"arch": arch, "source": source, "file": str(file), **options}
    )


def load_weights(
    arch: str, source: str, file: Path | str = "", seed: int = 0, **options: Any
) -> tuple[dict[str, torch.Tensor], Provenance]:
    """Tensors and provenance at once; arguments of `weights_spec`."""
    weights = open_weights(weights_spec(arch, source, file, **options), seed)
    return weights.load(), weights.provenance


def build_backbone(
    arch: str,
    source: str = "random",
    blocks: str | tuple[int, ...] = "auto",
    normalisation: str = "checkpoint",
    file: Path | str = "",
    seed: int = 0,
) -> Backbone:
    """A backbone without a study."""
    weights = open_weights(weights_spec(arch, source, file), seed)
    return Backbone(arch, weights, blocks, normalisation).eval()


def blobs(shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bright discs on noise: (Z, Y, X) uint8 image and 0/1 label, learnable even from random
    features."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    yy, xx = np.mgrid[: shape[1], : shape[2]]
    for _ in range(4):
        y, x = (rng.integers(10, side - 10) for side in shape[1:])
        r = rng.integers(12, 20)
        label[:, (yy - y) ** 2 + (xx - x) ** 2 < r * r] = 1
    image = np.clip(rng.normal(90, 12, shape) + 90 * label, 0, 255).astype(np.uint8)
    return image, label


def write_stack(folder: Path, image: np.ndarray, label: np.ndarray) -> None:
    """A dataset in the layout `stack`, without an official test volume."""
    folder.mkdir(parents=True)
    tifffile.imwrite(folder / "image.tif", image, photometric="minisblack")
    tifffile.imwrite(folder / "label.tif", label, photometric="minisblack")


def settings(arch: str = "tiny_dinov2", **train: Any) -> dict[str, Any]:
    """A study of two small datasets and a tiny random backbone, as params.yaml has it."""
    return {
        "study": {
            "name": "tiny",
            "datasets": ["a", "b"],
            "backbones": ["t"],
            "regimes": ["frozen", "lora"],
            "train_sets": ["a", "paired"],
            "seeds": [0],
        },
        "datasets": {
            "a": {"layout": "stack", "voxel_nm": [30, 5, 5], "foreground": [1]},
            "b": {"layout": "stack", "voxel_nm": [50, 5, 5], "foreground": [1]},
        },
        "train_sets": {"a": ["a"], "paired": ["a", "b"]},
        "backbones": {
            "t": {"arch": arch, "source": "random", "tile": 64, "overlap": 0.25, "views": 1}
        },
        "regimes": {"frozen": {"kind": "frozen"}, "lora": {"kind": "lora", "rank": 2, "alpha": 4}},
        "split": "default",
        "diagnose": {"blocks": 4, "tokens": 200, "permutations": 9, "replicates": 4},
        "train": {"epochs": 2, "steps_per_epoch": 3, "batch": 2, "warmup_steps": 2, **train},
    }


def alignment(method: str, reference: str = "b") -> dict[str, str]:
    return {"align": method, "reference": reference}


def make_study(root: Path, params: dict[str, Any] | None = None, *, ingested: bool = True) -> Study:
    """Write data and params.yaml under `root` (the working directory of the test) and ingest."""
    for seed, name in enumerate(("a", "b")):
        write_stack(root / "data" / name, *blobs((10, 90, 100), seed))
    (root / "params.yaml").write_text(yaml.safe_dump(params or settings(), sort_keys=False))
    study = load_study(root / "params.yaml")
    if ingested:
        for name in study.datasets:
            ingest(study, name, root / "data", root / "build/ingest")
    return study


def under_dvc(root: Path) -> Callable[..., str]:
    """Put a study under git and DVC, with the project's own pipeline.

    Returns:
        Runs a command there and gives its stdout; with `code=2`, one that has to fail so, and its
        stderr.
    """
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(Path(__file__).parents[1] / name, root / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def sh(*command: str, code: int = 0) -> str:
        done = subprocess.run(
            command, cwd=root, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    sh("git", "init", "-q")
    sh("dvc", "init", "-q")
    sh("dvc", "add", "-q", "data")
    return sh


def trained(study: Study, unit: Unit) -> bytes:
    """The weights file of a unit, trained if need be."""
    return (train_unit(study, unit) / "model.safetensors").read_bytes()


def stop_at_a_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """Have a training interrupted when its first checkpoint is written."""
    save = Run.save

    def stop(run: Run, scratch: Path) -> None:
        save(run, scratch)
        raise KeyboardInterrupt

    patch.setattr(Run, "save", stop)


def stop_after_an_epoch(study: Study, unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a unit and interrupt it when its first checkpoint is written."""
    with monkeypatch.context() as patch:
        stop_at_a_checkpoint(patch)
        with pytest.raises(KeyboardInterrupt):
            train_unit(study, unit)


def regime_for(
    backbone: dict[str, Any], settings: RegimeSettings | None = None, head: str = "linear"
) -> Regime:
    """A regime, frozen unless said otherwise, on a backbone with these settings."""
    settings = settings or regime_settings(kind="frozen")
    return REGIMES[settings.kind](settings, BackboneSettings(**backbone), head)


def build_model(
    spec: BackboneSettings, settings: RegimeSettings, head: str, seed: int = 0
) -> Segmenter:
    """A fresh model."""
    return REGIMES[settings.kind](settings, spec, head).build(seed)


def predict_slice(
    segmenter: Segmenter, image: Grey, overlap: float | None = None, aligner: Aligner = AS_IT_IS
) -> Probability:
    """Foreground probability of one slice by a model of single slices.

    Args:
        segmenter: in eval mode.
        image: (Y, X) uint8; for a backbone with `context` (Y, X, 3), see
            `data.tiles.with_neighbours`.
        overlap: share of a tile that neighbours cover too; None: that of the settings.
        aligner: of the slice's dataset.

    Returns:
        (Y, X) float32 in [0, 1], at the slice's own resolution.
    """
    native = (image.shape[0], image.shape[1])
    geo = geometry(native, segmenter.spec, segmenter.patch, aligner)
    return to_native(segmenter.slab(to_input(image, geo)[None], geo, overlap)[0], geo)


def ingested(root: Path, params: dict[str, Any]) -> Study:
    """A study with these settings in a folder, whose dataset `a` is ingested."""
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    study = load_study(root / "params.yaml")
    ingest(study, "a", root / "data", root / "build/ingest")
    return study


def write_model(
    folder: Path,
    *,
    regime: RegimeSettings | None = None,
    head: str = "linear",
    facts: dict[str, Any] | None = None,
    classes: tuple[str, ...] = ONE_CLASS,
    **change: Any,
) -> Path:
    """A model folder as `train` writes it, with random weights that answer differently in different
    places."""
    own = regime_for({**TINY, "overlap": 0.4, **change}, regime, head)
    segmenter = own.build(1, classes)
    with torch.no_grad():
        if isinstance(last := getattr(segmenter.head, "classify", None), torch.nn.Conv2d):
            last.weight.mul_(8)
            last.bias.zero_()  # type: ignore[union-attr]
            # Their statistics are those of no data: answers hardly differ.
            if head in ("deconv", "pyramid_bn"):
                last.weight.mul_(1e4 if head == "deconv" else 100)
        for name, factor in segmenter.named_parameters():
            # Zero at the start: an adapter that does nothing would show no mistake.
            if ".lora_B." in name:
                factor.normal_(std=0.2)
    card = {
        "unit": "t-frozen-a-0",
        "threshold": 0.5,
        "version": emadapt.__version__,
        "voxel_nm": {"a": [30, 5, 5]},
        "shape": {"a": [10, 90, 100]},
        "intensity": {"a": {"low": 0.0, "high": 255.0, "percentiles": [0.5, 99.5]}},
        "data_md5": {"a": "0" * 32},
        "pairing": {"a": "number"},
        "labelled": {"slices": [7, 7], "crops": [28, 28]},
        "settings": {},
        "key": "k" * 24,
        "study": "tiny",
        "trainable_params": segmenter.n_trainable(),
        "precision": "fp32",
    }
    save_model(segmenter, own, folder, card | (facts or {}))
    return folder


def predicted(folder: Path, image: np.ndarray) -> np.ndarray:
    """Foreground probabilities of a volume (30 nm along z) as `evaluate` computes them."""
    split: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    manifest = {"split": split, "md5": "", "voxel_nm": [30, 5, 5]}
    segmenter, _ = load_model(folder)
    slices = list(range(len(image)))
    found = predict_slices(segmenter, Volume("v", image, image, manifest), slices)
    return np.stack([probability for _, probability in found])


def write_3d_model(folder: Path, **change: Any) -> Path:
    """As `write_model`, of a network in 3D whose answers differ from place to place."""
    patch = (4, 32, 32)
    kind = regime_settings(kind="resunet3d", patch=patch, channels=(2, 2, 2, 2, 2))
    write_model(folder, regime=kind, head="resunet3d", **{"tile": 32, **change})
    segmenter, _ = load_model(folder)
    torch.manual_seed(0)
    segmenter.train()
    with torch.no_grad():
        for _ in range(3):  # running statistics of its own
            segmenter(torch.rand(2, 1, *patch), patch[1:])
        segmenter.head.after.conv.weight.mul_(10)  # type: ignore[union-attr, operator]
    save_file(segmenter.trained_state(), folder / "model.safetensors")
    return folder
