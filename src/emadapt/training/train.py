"""Train one unit: its inputs, its key, its model and its run. Resumes exactly; on a CPU the same unit gives the same bytes."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emadapt
from emadapt.data.align import described
from emadapt.data.blocks import PatchDataset
from emadapt.data.crops import CropDataset, TokenDataset
from emadapt.data.ingest import Volume, open_volume
from emadapt.data.labelled import Tile, few_slices, few_tiles, with_training
from emadapt.data.splits import check_depth, starts_in
from emadapt.data.tiles import geometry_of
from emadapt.errors import InputError
from emadapt.files import file_md5, write_json
from emadapt.models import parallel
from emadapt.models.closest import token_facts, token_statistics
from emadapt.models.device import check_precision, device, resolve_precision
from emadapt.models.heads import needs_image
from emadapt.models.regimes import State
from emadapt.models.segmenter import Segmenter, build_segmenter, save_segmenter
from emadapt.models.tokens import TokenView, plain_view, token_views
from emadapt.study.study import Study, TrainSettings, Unit
from emadapt.tracking.publish import Log, live
from emadapt.tracking.run import Run
from emadapt.training import twins
from emadapt.training.closed_form import FITS, fit_ridge
from emadapt.training.fit import Data, Inputs, Progress, fit, score
from emadapt.training.interpolate import interpolate
from emadapt.training.model_card import sources_of
from emadapt.training.plan import unit_key
from emadapt.training.start import behind_folders, folder_state, load_start
from emadapt.training.tracked import UNITS, add_model, as_dataset, unit_run

ADAPTED = Path("build/adapted")
UNTRACKED = "untracked"
"""Beside a checkpoint: its epochs are in no run of the lab book, since another unit that starts from this one had it trained."""
SCRATCH = Path("scratch/units")


@dataclass(frozen=True)
class Labelled:
    """The datasets of a training set.

    Attributes:
        whole: as ingested.
        volumes: with the labelled training slices alone.
        tiles: the labelled tiles, or patches in 3D, of each; empty where whole slices are labelled.
        counts: labelled ones and all, over the datasets, in `slices` and in tiles (`crops`).
    """

    whole: list[Volume]
    volumes: list[Volume]
    tiles: list[list[Tile]]
    counts: dict[str, tuple[int, int]]


def prepare(study: Study, unit: Unit) -> Inputs:
    """A fresh segmenter and the data of `unit`, its tokens computed where they are not cached.

    Raises:
        EmadaptError: the inputs are not there, or several processes cannot train it.
    """
    regime, train = study.regime_settings[unit.regime], study.train_settings(unit)
    if (regime.align or regime.outside) and parallel.size() > 1:
        why = f"`align: {regime.align}`" if regime.align else f"regime {regime.kind}"
        raise InputError(
            f"unit {unit.name}",
            found=f"{parallel.size()} processes",
            expected=f"one, for {why}",
            do="Train it on one device.",
        )
    if regime.is_3d:
        check_precision(train.precision, "train.precision")
        check_precision(
            study.backbone_settings[unit.backbone].precision, f"backbones.{unit.backbone}.precision"
        )
    names = study.train_set_settings[unit.train_set].datasets
    segmenter = build_segmenter(
        study.backbone_settings[unit.backbone], regime, train.head, unit.seed, names
    ).to(device())
    labelled = label(study, unit, segmenter)
    others = [open_volume(name) for name in study.unlabelled_of(unit)]
    views = _training_views(segmenter, labelled, study, unit) if _is_cached(study, unit) else []
    if regime.init == "ridge":
        fit_ridge(
            segmenter,
            labelled.volumes,
            views or _training_views(segmenter, labelled, study, unit),
            train,
            unit.seed,
        )
    start, taken = _start(study, unit, segmenter) if regime.init_from else ("", None)
    given = (train.augment, labelled.tiles, others)
    data: Data
    if regime.is_3d:
        data = PatchDataset(
            labelled.volumes, segmenter.spec, segmenter.backbone.arch.patch, regime.patch, *given
        )
    else:
        data = CropDataset(labelled.volumes, segmenter.spec, segmenter.backbone.arch.patch, *given)
    if views:
        other_views = _training_views(segmenter, Labelled(others, others, [], {}), study, unit)
        data = TokenDataset(views, needs_image(train.head), other_views)
    return Inputs(segmenter, labelled.volumes, views, data, labelled.counts, start, others, taken)


def label(study: Study, unit: Unit, segmenter: Segmenter) -> Labelled:
    """The datasets that `unit` trains on, as far as they count as labelled."""
    spec, whole = (
        study.train_set_settings[unit.train_set],
        [open_volume(n) for n in study.train_set_settings[unit.train_set].datasets],
    )
    depth = segmenter.regime.patch[0] if segmenter.regime.is_3d else 1
    geos = [geometry_of(v, segmenter.spec, segmenter.backbone.arch.patch) for v in whole]
    if segmenter.regime.is_3d:
        geos = [dataclasses.replace(geo, tile=segmenter.regime.patch[1:]) for geo in geos]
        for volume in whole:
            check_depth(volume.name, volume.split["train"], segmenter.regime.patch)
    corners = [geo.corners(0.0) for geo in geos]
    starts = [starts_in(v.split["train"], depth, apart=True) for v in whole]
    volumes, tiles = [few_slices(v, spec, unit.seed) for v in whole], []
    if spec.crops:
        tiles = [
            few_tiles(v, spec, c, unit.seed, s)
            for v, c, s in zip(whole, corners, starts, strict=True)
        ]
        slices = [sorted({z + k for z, _, _ in own for k in range(depth)}) for own in tiles]
        volumes = [with_training(v, own) for v, own in zip(whole, slices, strict=True)]
    n, of = (sum(len(v.split["train"]) for v in some) for some in (volumes, whole))
    n_tiles, of_tiles = (
        sum(
            len(starts_in(v.split["train"], depth, apart=True)) * len(c)
            for v, c in zip(some, corners, strict=True)
        )
        for some in (volumes, whole)
    )
    return Labelled(
        whole,
        volumes,
        tiles,
        {"slices": (n, of), "crops": (sum(map(len, tiles)) or n_tiles, of_tiles)},
    )


def _start(study: Study, unit: Unit, segmenter: Segmenter) -> tuple[str, Progress | None]:
    """Load what `unit` starts from into the segmenter; gives its hash and, of interpolated weights, the training behind them."""
    regime, source = study.regime_settings[unit.regime], study.source_of(unit)
    if not source:
        return load_start(segmenter, folder_state(Path(regime.init_from), segmenter)), None
    state, training = weights_of(study, source)
    first = study.source_of(source)
    if not regime.interpolated or not first:
        return load_start(segmenter, state), None
    probed, _ = weights_of(study, first)
    print(
        f"train {unit.name}: {regime.interpolate:g} of the way from {first.name} to {source.name}, not trained"
    )
    return load_start(
        segmenter, interpolate(segmenter, state, probed, regime.interpolate)
    ), training


def weights_of(study: Study, unit: Unit) -> tuple[State, Progress]:
    """Trained tensors of a unit and its training: of its published model, or of one that is gone on with or begun."""
    inputs = prepare(study, unit)
    key, segmenter = unit_key(study, unit), inputs.segmenter
    with twins.turn(key):
        if published := twins.find(UNITS, key):
            fields, _ = twins.adopt(published, segmenter)
            return segmenter.trained_state(), Progress(**fields)
        scratch = SCRATCH / unit.name / key
        if not (scratch / "checkpoint.pt").is_file():
            scratch.mkdir(parents=True, exist_ok=True)
            (scratch / UNTRACKED).touch()
        progress = _fit(
            inputs, study.train_settings(unit), unit, scratch, lambda metrics, step: None
        )
    return segmenter.trained_state(), progress


def train_unit(study: Study, unit: Unit) -> Path:
    """Train `unit`, or go on where it was stopped, and write build/units/<unit>/; logged as a run of the lab book.

    Of several processes (see `emadapt.models.parallel`) the first one writes and logs.

    Returns:
        The folder with model.safetensors, model.json and history.json.

    Raises:
        EmadaptError: the loss is not finite, or the inputs are not there.
    """
    parallel.join()
    processes, is_first = parallel.size(), parallel.rank() == 0
    train, inputs = study.train_settings(unit), prepare(study, unit)
    segmenter, volumes, key = inputs.segmenter, inputs.volumes, unit_key(study, unit)
    scratch = SCRATCH / unit.name / key
    weights = segmenter.backbone.provenance
    run = unit_run(study, unit, "train")
    run.tags |= {
        "unit.key": key,
        "weights.source": weights.source,
        "weights.sha256": weights.sha256,
    }
    if (scratch / "checkpoint.pt").is_file():  # a training from the start is a new run
        run.same = ("unit", "unit.key")
    run.datasets = [
        *(as_dataset(volume, "training") for volume in volumes),
        *(as_dataset(volume, "unlabelled") for volume in inputs.unlabelled),
    ]
    run.muted = not is_first
    with live(run) as log_epoch, twins.turn(key):
        progress, final = _fit_or_copy(inputs, train, unit, key, scratch, log_epoch, run)
        parallel.leave()
        if not is_first:
            return UNITS / unit.name
        for i, volume in enumerate(volumes if segmenter.domains else []):
            view = inputs.views[i][0] if inputs.views else None
            segmenter.domains[volume.name] = token_statistics(
                segmenter, volume, volume.split["train"], view
            )
        facts = _facts(study, unit, key, inputs, progress, final)
        if processes > 1:
            run.results["processes"] = facts["processes"] = processes
        folder = _publish(segmenter, facts, progress, unit, final)
        _note_adapted(study, unit, folder)
        add_model(run, folder)
    return folder


def _facts(
    study: Study, unit: Unit, key: str, inputs: Inputs, progress: Progress, final: dict[str, float]
) -> dict[str, Any]:
    """What model.json says beside how to build the model: all that prediction and a sceptic need."""
    segmenter, volumes = inputs.segmenter, inputs.volumes
    return {
        "labelled": inputs.labelled,
        "unit": unit.name,
        "key": key,
        "study": study.name,
        "settings": study.describe(unit),
        "threshold": 0.5,
        "data_md5": {v.name: v.md5 for v in volumes},
        "sources": sources_of(study.describe(unit)),
        "val": final,
        "best_epoch": progress.best_epoch,
        "trainable_params": segmenter.n_trainable(),
        "precision": resolve_precision(study.train_settings(unit).precision),
        "version": emadapt.__version__,
        "intensity": {v.name: v.manifest["intensity"] for v in volumes},
        "voxel_nm": {v.name: v.manifest["voxel_nm"] for v in volumes},
        "shape": {v.name: list(v.image.shape) for v in volumes},
        "tokens": token_facts(segmenter, volumes, [own[0] for own in inputs.views]),
        "pairing": {v.name: v.manifest["pairing"] for v in volumes},
        **({"align": aligned} if (aligned := described(volumes, segmenter.spec)) else {}),
        **(
            {"unlabelled_md5": {v.name: v.md5 for v in inputs.unlabelled}}
            if inputs.unlabelled
            else {}
        ),
        **({"started_from": before} if (before := behind_folders(study, unit)) else {}),
    }


def _publish(
    segmenter: Segmenter,
    facts: dict[str, Any],
    progress: Progress,
    unit: Unit,
    final: dict[str, float],
) -> Path:
    """Write the unit's folder under a temporary name, then rename; say what it took."""
    folder, temporary = UNITS / unit.name, UNITS / f".{unit.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    save_segmenter(segmenter, temporary, facts)
    peak = progress.peak_mb or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cost = {"seconds": round(progress.seconds, 2), "peak_mb": round(peak, 1)}
    (temporary / "history.json").write_text(
        json.dumps({"epochs": progress.history, **cost}, indent=1) + "\n"
    )
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    n = segmenter.n_trainable()
    print(
        f"train {unit.name}: val IoU {final['iou']:.4f} (epoch {progress.best_epoch}), {n:,} trained parameters, "
        f"of the backbone {segmenter.share():.2%}, "
        f"{progress.seconds:.0f} s, peak {peak:.0f} MB"
    )
    return folder


def _note_adapted(study: Study, unit: Unit, folder: Path) -> None:
    """Write the md5 of a model that has tokens of its own, on which `diagnose` of its regime depends."""
    own = study.tokens_of(unit.regime) == unit.regime
    adapted = own and not study.regime_settings[unit.regime].pretrained_tokens
    md5 = file_md5(folder / "model.safetensors") if adapted else None
    path = ADAPTED / f"{unit.backbone}-{unit.regime}" / f"{unit.name}.json"
    write_json(path, {"model_md5": md5})


def _is_cached(study: Study, unit: Unit) -> bool:
    """Whether the unit is fitted to the token cache; else the whole backbone runs in the loop."""
    regime = study.regime_settings[unit.regime]
    if regime.kind in ("ridge", "knn"):
        return True
    few_crops = bool(
        study.train_set_settings[unit.train_set].crops
    )  # cached augmented crops lie elsewhere in the slices
    return (
        regime.kind in ("frozen", "lora_last_k")
        and study.train_settings(unit).cached
        and not few_crops
    )


def _training_views(
    segmenter: Segmenter, labelled: Labelled, study: Study, unit: Unit
) -> list[list[TokenView]]:
    """Cache entries per training volume, of what no step changes; only labelled rows count as training rows."""
    train, spec = study.train_settings(unit), study.backbone_settings[unit.backbone]
    augmented = range(1, spec.views + 1 if train.augment and not labelled.tiles else 1)
    views = [
        [
            plain_view(segmenter.backbone, spec, v, cut=segmenter.cut),
            *token_views(segmenter.backbone, spec, v, augmented, cut=segmenter.cut),
        ]
        for v in labelled.whole
    ]
    only = [frozenset(own) if own else None for own in labelled.tiles or [[]] * len(views)]
    return [
        [dataclasses.replace(view, split=v.split, only=tiles) for view in own]
        for own, v, tiles in zip(views, labelled.volumes, only, strict=True)
    ]


def fit_at_once(
    inputs: Inputs,
    train: TrainSettings,
    unit: Unit,
    scratch: Path,
    on_epoch: Callable[[dict[str, float], int], None],
) -> Progress:
    """Fit a regime of `FITS`, with the arguments of `fit`: its candidates stand where others have epochs."""
    started = time.perf_counter()
    fit_regime = FITS[inputs.segmenter.regime.kind]
    history, best = fit_regime(
        inputs.segmenter.eval(), inputs.volumes, inputs.views, train, unit.seed
    )
    for number, metrics in enumerate(history, 1):
        on_epoch(metrics, number)
    return Progress(
        len(history), history[best]["val/iou"], best, time.perf_counter() - started, history
    )


def _fit(
    inputs: Inputs,
    train: TrainSettings,
    unit: Unit,
    scratch: Path,
    on_epoch: Callable[[dict[str, float], int], None],
) -> Progress:
    """Train, at once or in steps. Interpolated weights are not trained: they have cost what the unit did that they lead to.

    A published system that is used as it is costs nothing.
    """
    if inputs.segmenter.regime.untrained:
        return Progress()
    if inputs.taken:
        return dataclasses.replace(inputs.taken, history=[])
    return (fit_at_once if inputs.segmenter.regime.kind in FITS else fit)(
        inputs, train, unit, scratch, on_epoch
    )


def _fit_or_copy(
    inputs: Inputs,
    train: TrainSettings,
    unit: Unit,
    key: str,
    scratch: Path,
    log_epoch: Log,
    run: Run,
) -> tuple[Progress, dict[str, float]]:
    """The training and the validation scores of its model."""
    segmenter = inputs.segmenter
    if parallel.size() == 1 and (twin := twins.find(UNITS, key, unit.name)):
        run.results["copy_of"] = twin.name
        return _copy(twin, segmenter)
    progress = _fit(inputs, train, unit, scratch, log_epoch)
    if (untracked := scratch / UNTRACKED).is_file() and parallel.rank() == 0:  # the one that logs
        for epoch, metrics in enumerate(progress.history, 1):
            log_epoch(metrics, epoch)
        untracked.unlink()
    return progress, score(segmenter, inputs.volumes, inputs.views, every=0)


def _copy(twin: Path, segmenter: Segmenter) -> tuple[Progress, dict[str, float]]:
    """Take over the weights, history and cost of a finished unit that this one cannot differ from."""
    fields, final = twins.adopt(twin, segmenter)
    progress = Progress(**fields)
    print(f"train: {twin.name} is the same model: copied")
    return progress, final
