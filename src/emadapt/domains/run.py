"""The `diagnose` stage: one backbone under one regime, every pair of datasets of the study, before and after adaptation."""

from __future__ import annotations

import itertools
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.data.ingest import Volume, open_volume
from emadapt.data.tiles import Grey
from emadapt.domains import compare, figures, pca
from emadapt.domains.features import (
    Features,
    computed_features,
    pixel_features,
    pretrained_features,
)
from emadapt.domains.moments import z_blocks
from emadapt.files import file_md5, write_json
from emadapt.models.adapters import merge
from emadapt.models.backbones import Backbone, pretrained
from emadapt.models.device import device
from emadapt.study.backbones import BackboneSettings
from emadapt.study.study import Study
from emadapt.study.training import DiagnoseSettings
from emadapt.tracking.publish import publish
from emadapt.training.model_files import load_model
from emadapt.training.tracked import UNITS, finished_run

OUT = Path("reports/domain")
PRETRAINED = "pretrained"
CONTRAST = 0.5


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


def diagnose(study: Study, backbone_name: str, regime: str, out: Path = OUT) -> Path:
    """Measure the domain mismatch and write <backbone>-<regime>.json and a folder of figures beside it.

    A frozen regime has one model, the pretrained backbone, and the controls; an adapted one has one
    model per unit. Regimes without tokens of their own (ridge, kNN, a U-Net from scratch) get a
    note that says so, and no measures.

    Raises:
        InputError: no token cache or no trained unit, too few slices, a class without tokens,
            tokens that are not finite.
    """
    if study.tokens_of(regime) != regime:
        return _note(study, backbone_name, regime, out)
    started, own = time.perf_counter(), study.diagnose
    spec, volumes = (
        study.backbone_settings[backbone_name],
        [open_volume(name) for name in study.datasets],
    )
    backbone = pretrained(spec)
    before = Model(
        PRETRAINED,
        None,
        None,
        {v.name: pretrained_features(backbone, spec, v, own) for v in volumes},
    )
    frozen = study.regime_settings[regime].on_pretrained_tokens
    models = [before] if frozen else list(_adapted(study, backbone_name, regime, volumes))
    result: dict[str, Any] = {
        "study": study.name,
        "backbone": backbone_name,
        "regime": regime,
        "weights": backbone.provenance.to_dict(),
        "settings": own.model_dump(mode="json"),
        "pairs": [],
        "segmentation": [],
        "outliers": [],
    }
    for model in models:
        _measure(model, before, own, result)
        print(
            f"diagnose {backbone_name}-{regime}: {model.name}, {time.perf_counter() - started:.0f} s"
        )
    spectra = {model.name: pca.fit(model.features, 10)[1] for model in models}
    result["pca"] = {"explained_variance": spectra[models[0].name], "models": spectra}
    result["controls"] = (
        _controls(spec, backbone, before, volumes, own) if frozen and own.controls else {}
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result |= {"seconds": round(time.perf_counter() - started, 1), "peak_mb": round(peak)}
    folder = out / f"{backbone_name}-{regime}"
    one_seed = [m for m in models if m.seed in (None, study.seeds[0])]
    figures.draw(
        folder, f"{backbone_name}, {regime}", {m.name: m.features for m in one_seed}, result
    )
    path = out / f"{backbone_name}-{regime}.json"
    write_json(path, result)
    print(
        f"diagnose {backbone_name}-{regime}: {len(result['pairs'])} comparisons, {result['seconds']:.0f} s, peak {peak:.0f} MB"
    )
    _track(study, backbone_name, regime, result, path)
    return path


def _note(study: Study, backbone: str, regime: str, out: Path) -> Path:
    """Write the two outputs for a regime that has no tokens of its own: empty lists, and a sentence why."""
    if source := study.tokens_of(regime):
        text = f"{regime} works on the tokens of the pretrained backbone: what is said of {backbone}, {source} holds for it."
    else:
        text = f"{regime} has no backbone, so there are no tokens to compare."
    result: dict[str, Any] = {
        "study": study.name,
        "backbone": backbone,
        "regime": regime,
        "note": text,
        "same_as": source or None,
        "pairs": [],
        "segmentation": [],
        "outliers": [],
        "controls": {},
    }
    folder, path = out / f"{backbone}-{regime}", out / f"{backbone}-{regime}.json"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "note.txt").write_text(text + "\n")
    write_json(path, result)
    print(f"diagnose {backbone}-{regime}: {text}")
    _track(study, backbone, regime, result, path)
    return path


def _adapted(study: Study, backbone: str, regime: str, volumes: list[Volume]) -> Iterator[Model]:
    """The study's units of this backbone and regime, one at a time."""
    for unit in study.units():
        if (unit.backbone, unit.regime) != (backbone, regime):
            continue
        segmenter, _ = load_model(UNITS / unit.name)
        merge(segmenter.backbone)
        segmenter.to(device())
        md5 = file_md5(UNITS / unit.name / "model.safetensors")
        weights = f"{segmenter.backbone.provenance.sha256} {md5}"
        found = {}
        for v in volumes:
            found[v.name] = computed_features(
                segmenter.backbone, segmenter.spec, v, study.diagnose, weights
            )
        yield Model(unit.name, unit.train_set, unit.seed, found)


def _measure(model: Model, before: Model, own: DiagnoseSettings, result: dict[str, Any]) -> None:
    """Everything about one model: pairs of datasets, and each dataset by itself.

    Without labels what needs none; of a class that too few slices have, nothing, which is said and
    does not end the stage.
    """
    there = {
        name: [
            cls
            for cls in ("foreground", "background")
            if f.labelled and compare.measurable(f, cls, own)
        ]
        for name, f in model.features.items()
    }
    for name, f in model.features.items():
        if f.labelled and (lacking := {"foreground", "background"} - set(there[name])):
            print(
                f"diagnose: {name} has {' and '.join(sorted(lacking))} in too few of its {len(f.slices)} slices to be compared:"
                " nothing is said of it",
                file=sys.stderr,
            )

    def levels(*some: Features) -> list[tuple[str, str]]:
        classes = [
            ("token", cls)
            for cls in ("foreground", "background")
            if all(cls in there[f.name] for f in some)
        ]
        return [("token", "all"), *classes, ("image", "all")]

    nulls = {
        (d, level, cls): compare.split_half_null(f, level, cls, own)
        for d, f in model.features.items()
        for level, cls in levels(f)
    }
    for one, other in _pairs(model.features, own):
        for level, cls in levels(one, other):
            two = {each.name: nulls[each.name, level, cls] for each in (one, other)}
            entry = compare.compare(one, other, level, cls, own, two)
            result["pairs"].append(model.tags | entry)
    for a, b in itertools.product(model.features, repeat=2):
        if own.against not in ("", a, b) and a != b:
            continue
        fa, fb = model.features[a], model.features[b]
        if len(there[a]) == len(there[b]) == 2:
            result["segmentation"].append(model.tags | compare.segmentation(fa, fb, own))
        if a != b and not fa.labelled:
            continue  # all its slices are training slices: none is held out for the comparison
        if a != b:
            result["outliers"].append(model.tags | compare.outlyingness(fa, fb))


def _controls(
    spec: BackboneSettings,
    backbone: Backbone,
    before: Model,
    volumes: list[Volume],
    own: DiagnoseSettings,
) -> dict[str, list[dict[str, Any]]]:
    """What the numbers read where the answer is known: halves of one volume, contrast alone, random weights, raw pixels."""
    random = spec.changed(source="random", file="")
    untrained = pretrained(random).to(device())
    seed_hash = untrained.provenance.sha256
    backbone.to(device())
    names = [v.name for v in volumes]
    pixels = [pixel_features(spec, backbone.arch.patch, v, own) for v in volumes]
    noise = [computed_features(untrained, random, v, own, seed_hash) for v in volumes]
    halved, contrast = [], []
    for volume, pixel in zip(volumes, pixels, strict=True):
        whole = before.features[volume.name]
        lower, upper = halves(whole, own)
        null = {volume.name: compare.split_half_null(whole, "token", "all", own)}
        halved.append(
            compare.compare(lower, upper, "token", "all", own.changed(blocks=own.blocks // 2), null)
        )
        name, train = f"{volume.name} (contrast {CONTRAST})", whole.places("train")
        changed = computed_features(
            backbone, spec, volume, own, backbone.provenance.sha256, lower_contrast, name
        )
        changed_pixels = pixel_features(
            spec, backbone.arch.patch, volume, own, lower_contrast, name
        )
        fewer = own.changed(blocks=min(own.blocks, len(train)))
        for level, one, other in (("token", whole, changed), ("pixel", pixel, changed_pixels)):
            # Training slices alone: both tile them alike, so that nothing but the contrast differs.
            contrast.append(
                compare.compare(
                    one.of(train, volume.name), other.of(train, name), level, "all", fewer
                )
            )
    return {
        "halves": halved,
        "contrast": contrast,
        "random": [
            compare.compare(a, b, "token", "all", own)
            for a, b in _pairs(dict(zip(names, noise, strict=True)), own)
        ],
        "pixels": [
            compare.compare(a, b, "pixel", "all", own)
            for a, b in _pairs(dict(zip(names, pixels, strict=True)), own)
        ],
    }


def halves(whole: Features, own: DiagnoseSettings) -> tuple[Features, Features]:
    """The lower and the upper half of a volume's blocks, which is one of the ways in which the null halves it."""
    first = z_blocks(len(whole.slices), own.blocks) < own.blocks // 2
    lower, upper = (
        whole.of(np.flatnonzero(places), f"{whole.name} ({part})")
        for places, part in ((first, "lower"), (~first, "upper"))
    )
    return lower, upper


def _pairs(found: Mapping[str, Features], own: DiagnoseSettings) -> list[tuple[Features, Features]]:
    """Every two datasets, or those with the one that the settings name."""
    return [
        (found[a], found[b])
        for a, b in itertools.combinations(found, 2)
        if own.against in ("", a, b)
    ]


def lower_contrast(image: Grey) -> Grey:
    """The slice (Y, X) uint8 at half the contrast around mid-grey."""
    return np.asarray(np.round(127.5 + CONTRAST * (image.astype(np.float32) - 127.5)), np.uint8)


def _track(study: Study, backbone: str, regime: str, result: dict[str, Any], path: Path) -> None:
    """Add distances, the file and the figures to the runs of the units that they are about."""
    measures = ("frechet", "relative", "frechet_inf", "null", "knn_mixing")
    figures = sorted((path.parent / path.stem).glob("*.png"))
    for unit in study.units():
        if (unit.backbone, unit.regime) != (backbone, regime):
            continue
        if not (UNITS / unit.name / "model.json").is_file():
            continue
        run = finished_run(study, unit, "diagnose")
        for entry in result["pairs"]:
            if entry["model"] not in (PRETRAINED, unit.name) or entry["class"] != "all":
                continue
            prefix = "domain/" if entry["level"] == "token" else "domain/image_"
            values = {name: entry[name] for name in measures}
            values["probe"] = entry["probe"]["balanced_accuracy"]
            between = f"{entry['a']}__{entry['b']}"
            run.log({f"{prefix}{name}.{between}": value for name, value in values.items()})
        run.artifacts |= {f"domain/{file.name}": file for file in (path, *figures)}
        publish(run)
