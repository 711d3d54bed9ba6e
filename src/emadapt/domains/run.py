"""The stage `diagnose`: how far apart datasets are for one backbone under one regime."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emadapt.data.ingest import Volume, open_volume
from emadapt.domains import figures, pca
from emadapt.domains.compare import compare, segmentation, split_half_null
from emadapt.domains.features import Features
from emadapt.domains.token_sources import computed_features, pixel_features, pretrained_features
from emadapt.files import whole_folder, write_json
from emadapt.models.adapters import merge
from emadapt.models.backbones import Backbone, pretrained
from emadapt.models.device import device
from emadapt.study.backbones import BackboneSettings
from emadapt.study.study import Study, Unit
from emadapt.study.training import DiagnoseSettings
from emadapt.tracking.publish import publish
from emadapt.training.model_files import load_unit
from emadapt.training.plan import check_planned, diagnose_plan
from emadapt.training.tracked import UNITS, finished_run

OUT = Path("reports/domain")
PRETRAINED = "pretrained"
LEVELS = ("token", "image")
TRACKED = ("frechet", "relative", "frechet_inf", "null", "knn_mixing")
"""Measures of a pair that MLflow gets, besides the probe's balanced accuracy."""


@dataclass(frozen=True)
class Model:
    """A backbone whose tokens are compared: the pretrained one, or that of a unit."""

    name: str
    train_set: str | None
    seed: int | None
    features: dict[str, Features]

    @property
    def tags(self) -> dict[str, Any]:
        """What names it in an entry of the JSON file."""
        return {"model": self.name, "train_set": self.train_set, "seed": self.seed}


def diagnose(study: Study, backbone: str, regime: str) -> Path:
    """Measure the domain mismatch; write BACKBONE-REGIME.json and a folder of figures under `OUT`.

    A frozen regime has one model, the pretrained backbone, and the controls. An adapted one has one
    model for each unit. A study of one dataset, and regimes without tokens of their own (ridge,
    kNN, a U-Net from scratch), get a note that says so, and no measures.

    Raises:
        InputError: no trained unit, too few slices, tokens that are not finite, or other settings
            than planned.
    """
    name = f"{backbone}-{regime}"
    check_planned("diagnose", name, lambda: diagnose_plan(study, backbone, regime))
    head: dict[str, Any] = {"study": study.name, "backbone": backbone, "regime": regime}
    if study.classifies:
        return _note(head, "Distances between datasets of whole images are not measured.")
    if len(study.datasets) == 1:
        return _note(head, "One dataset has no other to be compared with.")
    source = study.tokens_of(regime)
    if source != regime:
        other = f"uses the pretrained tokens: see the diagnosis of {backbone}, {source}."
        none = "has no backbone, so there are no tokens to compare."
        text = f"{regime} {other if source else none}"
        return _note(head, text)
    started, own, spec = time.perf_counter(), study.diagnose, study.backbone_settings[backbone]
    volumes = [open_volume(name) for name in study.datasets]
    frozen = study.regime_settings[regime].on_pretrained_tokens
    loaded = pretrained(spec).to(device())
    if frozen:
        before = {v.name: pretrained_features(loaded, spec, v, own) for v in volumes}
        models = [Model(PRETRAINED, None, None, before)]
    else:
        models = list(_adapted(study, backbone, regime, volumes))
    result = head | {
        "weights": loaded.provenance.to_dict(),
        "settings": own.model_dump(mode="json"),
        "pairs": [],
        "segmentation": [],
    }
    for model in models:
        _measure(model, own, result)
    spectra = {model.name: pca.fit(model.features, 10)[1] for model in models}
    result["pca"] = {"explained_variance": spectra[models[0].name], "models": spectra}
    result["controls"] = _controls(spec, loaded, volumes, own) if frozen and own.controls else {}
    one_seed = [m for m in models if m.seed in (None, study.seeds[0])]
    shown = {model.name: model.features for model in one_seed}
    path = OUT / f"{backbone}-{regime}.json"
    figures.draw(path.with_suffix(""), f"{backbone}, {regime}", shown, result)
    write_json(path, result)
    seconds = time.perf_counter() - started
    print(f"diagnose {backbone}-{regime}: {len(result['pairs'])} comparisons, {seconds:.0f} s")
    _track(study, result, path)
    return path


def _note(head: dict[str, Any], text: str) -> Path:
    """Write both outputs where nothing is measured: empty lists, and why."""
    path = OUT / f"{head['backbone']}-{head['regime']}.json"
    with whole_folder(path.with_suffix("")) as folder:
        (folder / "note.txt").write_text(text + "\n")
    write_json(path, head | {"note": text, "controls": {}, "pairs": [], "segmentation": []})
    print(f"diagnose {path.stem}: {text}")
    return path


def _adapted(study: Study, backbone: str, regime: str, volumes: list[Volume]) -> Iterator[Model]:
    """The study's units of this backbone and regime, one at a time."""
    for unit in _units(study, backbone, regime):
        segmenter, _ = load_unit(study, unit)
        merge(segmenter.backbone)
        segmenter.to(device())
        own, spec = study.diagnose, segmenter.spec
        found = {v.name: computed_features(segmenter.backbone, spec, v, own) for v in volumes}
        yield Model(unit.name, unit.train_set, unit.seed, found)


def _units(study: Study, backbone: str, regime: str) -> list[Unit]:
    return [u for u in study.units() if (u.backbone, u.regime) == (backbone, regime)]


def _measure(model: Model, own: DiagnoseSettings, result: dict[str, Any]) -> None:
    """Add everything about one model: pairs of datasets, and what labels of one say of another."""
    nulls = {
        (name, level): split_half_null(f, level, own)
        for name, f in model.features.items()
        for level in LEVELS
    }
    for a, b in itertools.combinations(model.features.values(), 2):
        for level in LEVELS:
            null = max(nulls[f.name, level] for f in (a, b))
            result["pairs"].append(model.tags | compare(a, b, level, own, null))
    for a, b in itertools.product(model.features.values(), repeat=2):
        if all(f.labelled and f.ids.any() for f in (a, b)):
            result["segmentation"].append(model.tags | segmentation(a, b))


def _controls(
    spec: BackboneSettings, backbone: Backbone, volumes: list[Volume], own: DiagnoseSettings
) -> dict[str, list[dict[str, Any]]]:
    """How far apart datasets are without anything learned, for a pretrained backbone."""
    random = spec.changed(source="random", file="")
    untrained = pretrained(random).to(device())
    noise = [computed_features(untrained, random, v, own) for v in volumes]
    pixels = [pixel_features(spec, backbone.arch.patch, v, own) for v in volumes]
    return {
        "random": [compare(a, b, "token", own) for a, b in itertools.combinations(noise, 2)],
        "pixels": [compare(a, b, "pixel", own) for a, b in itertools.combinations(pixels, 2)],
    }


def _track(study: Study, result: dict[str, Any], path: Path) -> None:
    """Add distances, the file and the figures to the runs of the units that they are about."""
    artifacts = [path, *sorted((path.parent / path.stem).glob("*.png"))]
    for unit in _units(study, result["backbone"], result["regime"]):
        if not (UNITS / unit.name / "model.json").is_file():
            continue
        run = finished_run(study, unit, "diagnose")
        for entry in result["pairs"]:
            if entry["model"] in (PRETRAINED, unit.name):
                run.log(_metrics(entry))
        run.artifacts |= {f"domain/{file.name}": file for file in artifacts}
        publish(run)


def _metrics(entry: dict[str, Any]) -> dict[str, float]:
    """A pair's measures under their names in MLflow."""
    prefix = "domain/" if entry["level"] == "token" else "domain/image_"
    values = {name: entry[name] for name in TRACKED}
    values["probe"] = entry["probe"]["balanced_accuracy"]
    between = f"{entry['a']}__{entry['b']}"
    return {f"{prefix}{name}.{between}": value for name, value in values.items()}
