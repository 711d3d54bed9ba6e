"""Fit one unit: a head, and an adapter where the regime has one. Resumes exactly; on a CPU the same unit gives the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import emadapt
from emadapt import parallel, tracking, twins
from emadapt.closed_form import FITS, fit_ridge
from emadapt.config import Study, TrainSpec, Unit, digest, not_default
from emadapt.data.ingest import INGESTED, Volume, open_volume
from emadapt.data.labelled import Tile, few_slices, few_tiles, with_training
from emadapt.data.patches import CropDataset, Item, TokenDataset, deal, load_epoch, plan_epoch, with_absent
from emadapt.data.tiles import geometry
from emadapt.device import autocast, device, resolve_precision
from emadapt.errors import EmadaptError
from emadapt.models.heads import BatchNorm, needs_image
from emadapt.models.regimes import State, parameter_groups
from emadapt.models.segmenter import Segmenter, build_segmenter, save_segmenter
from emadapt.predict import predict_slices
from emadapt.start import folder_state, load_start
from emadapt.tokens import TokenView, token_views

UNITS = Path("build/units")
SCRATCH = Path("scratch/units")

Data = CropDataset | TokenDataset


@dataclass
class Progress:
    """Where training stands; what a checkpoint holds besides tensors."""

    epoch: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    peak_mb: float = 0.0
    """Of the twin that was copied; 0: this process's own."""


def loss_function(name: str) -> nn.Module:
    """MONAI's loss on (B, 2, H, W) logits and (B, 1, H, W) labels; over both classes, as the reference."""
    from monai.losses import DiceCELoss, DiceLoss, TverskyLoss

    common: dict[str, Any] = {"softmax": True, "to_onehot_y": True}
    losses: dict[str, Callable[[], nn.Module]] = {
        "dice_ce": lambda: DiceCELoss(**common),
        "dice": lambda: DiceLoss(**common),
        "tversky": lambda: TverskyLoss(**common, alpha=0.3, beta=0.7),  # misses cost more than false alarms
    }
    return losses[name]()


@dataclass(frozen=True)
class Inputs:
    """What a unit is fitted with.

    Attributes:
        views: token cache entries per volume; empty where the backbone runs in the loop.
        labelled: how much of the training set counts as labelled, see `Labelled.counts`.
        start: sha256 of the weights that `init_from` gave; empty without it.
    """

    segmenter: Segmenter
    volumes: list[Volume]
    views: list[list[TokenView]]
    data: Data
    labelled: dict[str, tuple[int, int]] = field(default_factory=dict)
    start: str = ""


@dataclass(frozen=True)
class Labelled:
    """The datasets of a training set.

    Attributes:
        whole: as ingested.
        volumes: with the labelled training slices alone.
        tiles: the labelled tiles of each; empty where whole slices are labelled.
        counts: labelled ones and all, over the datasets, in `slices` and in tiles (`crops`).
    """

    whole: list[Volume]
    volumes: list[Volume]
    tiles: list[list[Tile]]
    counts: dict[str, tuple[int, int]]


def prepare(study: Study, unit: Unit) -> Inputs:
    """A fresh segmenter and the data of `unit`, its tokens computed where they are not cached.

    Raises:
        EmadaptError: the inputs are not there.
    """
    regime, train = study.regime_specs[unit.regime], study.train_spec(unit)
    segmenter = build_segmenter(study.backbone_specs[unit.backbone], regime, train.head, unit.seed).to(device())
    labelled = label(study, unit, segmenter)
    views = _training_views(segmenter, labelled, study, unit) if _is_cached(study, unit) else []
    if regime.init == "ridge":
        fit_ridge(segmenter, labelled.volumes, views or _training_views(segmenter, labelled, study, unit), train, unit.seed)
    start = ""
    if regime.init_from:
        source = study.source_of(unit)
        start = load_start(segmenter, weights_of(study, source) if source else folder_state(Path(regime.init_from), segmenter))
    data: Data = CropDataset(labelled.volumes, segmenter.spec, segmenter.backbone.arch.patch, train.augment, labelled.tiles)
    if views:
        data = TokenDataset(views, with_image=needs_image(train.head))
    return Inputs(segmenter, labelled.volumes, views, data, labelled.counts, start)


def label(study: Study, unit: Unit, segmenter: Segmenter) -> Labelled:
    """The datasets that `unit` trains on, as far as they count as labelled."""
    spec, whole = study.train_set_specs[unit.train_set], [open_volume(n) for n in study.train_set_specs[unit.train_set].datasets]
    corners = [geometry((v.image.shape[1], v.image.shape[2]), segmenter.spec, segmenter.backbone.arch.patch).corners(0.0)
               for v in whole]  # fmt: skip
    volumes, tiles = [few_slices(v, spec, unit.seed) for v in whole], []
    if spec.crops:
        tiles = [few_tiles(v, spec, c, unit.seed) for v, c in zip(whole, corners, strict=True)]
        volumes = [with_training(v, sorted({z for z, _, _ in own})) for v, own in zip(whole, tiles, strict=True)]
    n, of = (sum(len(v.split["train"]) for v in some) for some in (volumes, whole))
    n_tiles, of_tiles = (
        sum(len(v.split["train"]) * len(c) for v, c in zip(some, corners, strict=True)) for some in (volumes, whole)
    )
    return Labelled(whole, volumes, tiles, {"slices": (n, of), "crops": (sum(map(len, tiles)) or n_tiles, of_tiles)})


def weights_of(study: Study, unit: Unit) -> State:
    """Trained tensors of a unit: of its published model, or of its training, which is gone on with or begun."""
    inputs = prepare(study, unit)
    key, segmenter = unit_key(study, unit, inputs), inputs.segmenter
    with twins.turn(key):
        if published := twins.find(UNITS, key):
            return load_file(published / "model.safetensors")
        fit_ = fit_at_once if segmenter.regime.kind in FITS else fit
        fit_(inputs, study.train_spec(unit), unit, SCRATCH / unit.name / key, lambda metrics, step: None)
    return segmenter.trained_state()


def unit_key(study: Study, unit: Unit, inputs: Inputs) -> str:
    """Hash over all that the trained weights depend on: a checkpoint under another one is not gone on from."""
    settings = twins.identity(not_default(study.describe(unit)), inputs.segmenter)
    settings |= {"data": [v.md5 for v in inputs.volumes], "version": emadapt.__version__,
                 "weights": inputs.segmenter.backbone.provenance.sha256}  # fmt: skip
    return digest(settings | ({"start": inputs.start} if inputs.start else {}))[:24]


def train_unit(study: Study, unit: Unit) -> Path:
    """Train `unit`, or go on where it was stopped, and write build/units/<unit>/; logged as a run of the lab book.

    Of several processes (see `emadapt.parallel`) the first one writes and logs.

    Returns:
        The folder with model.safetensors, model.json and history.json.

    Raises:
        EmadaptError: the loss is not finite, or the inputs are not there.
    """
    parallel.join()
    processes, is_first = parallel.size(), parallel.rank() == 0
    train, inputs = study.train_spec(unit), prepare(study, unit)
    segmenter, volumes, key = inputs.segmenter, inputs.volumes, unit_key(study, unit, inputs)
    scratch = SCRATCH / unit.name / key
    weights = segmenter.backbone.provenance
    tags = {
        **unit_tags(study, unit, "train"),
        "unit.key": key,
        "weights.source": weights.source,
        "weights.sha256": weights.sha256,
    }
    goes_on = ("unit", "unit.key") if (scratch / "checkpoint.pt").is_file() else ()  # a training from the start is a new run
    with (tracking.open_run(Path(), study.name, tags, study.describe(unit), resume_by=goes_on) if is_first
          else tracking.NullTracker()) as tracker:  # fmt: skip
        tracker.log_dict(study.describe(unit), "config.json")
        for volume in volumes:
            tracker.log_dataset(volume.name, volume.md5, str(INGESTED / volume.name), "training")
        with twins.turn(key):
            progress, final = _fit_or_copy(inputs, train, unit, key, scratch, tracker)
            parallel.leave()
            if not is_first:
                return UNITS / unit.name
            facts = _facts(study, unit, key, inputs, progress, final)
            if processes > 1:
                tracker.set_tags({"processes": processes})
                facts["processes"] = processes
            folder = _publish(segmenter, facts, progress, unit, final)
        tracker.log_metrics({f"val/best_{k}": v for k, v in final.items()}, step=0)
        tracker.set_tags({"model.md5": file_md5(folder / "model.safetensors"), "trainable_params": segmenter.n_trainable()})
        for name in ("model.safetensors", "model.json", "history.json"):
            tracker.log_artifact(folder / name, "model")
    return folder


def unit_tags(study: Study, unit: Unit, stage: str) -> dict[str, str]:
    """Tags that every run of the unit carries; `stage` is the one that made the run."""
    spec = {name: study.dataset_specs[name] for name in study.train_set_specs[unit.train_set].datasets}
    tags = {"unit": unit.name, "backbone": unit.backbone, "regime": unit.regime, "train_set": unit.train_set,
            "seed": str(unit.seed), "study": study.name, "stage": stage, **tracking.provenance_tags(Path())}  # fmt: skip
    if wrong := [name for name, data in spec.items() if data.pairing == "lexicographic"]:
        tags["pairing.lexicographic"] = ",".join(wrong)
    return tags


def file_md5(path: Path) -> str:
    """Md5 of a file, as DVC names it."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _facts(study: Study, unit: Unit, key: str, inputs: Inputs, progress: Progress,
           final: dict[str, float]) -> dict[str, Any]:  # fmt: skip
    """What model.json says beside how to build the model: all that prediction and a sceptic need."""
    segmenter, volumes = inputs.segmenter, inputs.volumes
    return {
        "labelled": inputs.labelled,
        "unit": unit.name, "key": key, "study": study.name, "settings": study.describe(unit), "threshold": 0.5,
        "data_md5": {v.name: v.md5 for v in volumes}, "val": final, "best_epoch": progress.best_epoch,
        "trainable_params": segmenter.n_trainable(),
        "precision": resolve_precision(study.train_spec(unit).precision), "version": emadapt.__version__,
        "intensity": {v.name: v.manifest["intensity"] for v in volumes},
        "voxel_nm": {v.name: v.manifest["voxel_nm"] for v in volumes},
        "pairing": {v.name: v.manifest["pairing"] for v in volumes},
    }  # fmt: skip


def _publish(segmenter: Segmenter, facts: dict[str, Any], progress: Progress, unit: Unit, final: dict[str, float]) -> Path:
    """Write the unit's folder under a temporary name, then rename; say what it took."""
    folder, temporary = UNITS / unit.name, UNITS / f".{unit.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    save_segmenter(segmenter, temporary, facts)
    peak = progress.peak_mb or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cost = {"seconds": round(progress.seconds, 2), "peak_mb": round(peak, 1)}
    (temporary / "history.json").write_text(json.dumps({"epochs": progress.history, **cost}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    n = segmenter.n_trainable()
    print(f"train {unit.name}: val IoU {final['iou']:.4f} (epoch {progress.best_epoch}), {n:,} trained parameters, "
          f"of the backbone {segmenter.share():.2%}, "
          f"{progress.seconds:.0f} s, peak {peak:.0f} MB")  # fmt: skip
    return folder


def _is_cached(study: Study, unit: Unit) -> bool:
    """Whether the unit is fitted to the token cache; else the whole backbone runs in the loop."""
    regime = study.regime_specs[unit.regime]
    if regime.kind in ("ridge", "knn"):
        return True
    few_crops = bool(study.train_set_specs[unit.train_set].crops)  # cached augmented crops lie elsewhere in the slices
    return regime.kind in ("frozen", "lora_last_k") and study.train_spec(unit).cached and not few_crops


def _training_views(segmenter: Segmenter, labelled: Labelled, study: Study, unit: Unit) -> list[list[TokenView]]:
    """Cache entries per training volume, of what no step changes; only labelled rows count as training rows."""
    train, spec = study.train_spec(unit), study.backbone_specs[unit.backbone]
    numbers = range(spec.views + 1 if train.augment and not labelled.tiles else 1)
    views = [token_views(segmenter.backbone, spec, v, numbers, cut=segmenter.cut) for v in labelled.whole]
    only = [frozenset(own) if own else None for own in labelled.tiles or [[]] * len(views)]
    return [[dataclasses.replace(view, split=v.split, only=tiles) for view in own]
            for own, v, tiles in zip(views, labelled.volumes, only, strict=True)]  # fmt: skip


def fit_at_once(inputs: Inputs, train: TrainSpec, unit: Unit, scratch: Path,
                on_epoch: Callable[[dict[str, float], int], None]) -> Progress:  # fmt: skip
    """Fit a regime of `FITS`, with the arguments of `fit`: its candidates stand where others have epochs."""
    started = time.perf_counter()
    fit_regime = FITS[inputs.segmenter.regime.kind]
    history, best = fit_regime(inputs.segmenter.eval(), inputs.volumes, inputs.views, train, unit.seed)
    for number, metrics in enumerate(history):
        on_epoch(metrics, number)
    return Progress(len(history), history[best]["val/iou"], best, time.perf_counter() - started, history)


def _fit_or_copy(inputs: Inputs, train: TrainSpec, unit: Unit, key: str, scratch: Path,
                 tracker: tracking.Tracker) -> tuple[Progress, dict[str, float]]:  # fmt: skip
    """The training and the validation scores of its model."""
    segmenter = inputs.segmenter
    if parallel.size() == 1 and (twin := twins.find(UNITS, key, unit.name)):
        return _copy(twin, segmenter, tracker)
    progress = (fit_at_once if segmenter.regime.kind in FITS else fit)(inputs, train, unit, scratch, tracker.log_metrics)
    return progress, score(segmenter, inputs.volumes, inputs.views, every=0)


def _copy(twin: Path, segmenter: Segmenter, tracker: tracking.Tracker) -> tuple[Progress, dict[str, float]]:
    """Take over the weights, history and cost of a finished unit that this one cannot differ from."""
    fields, final = twins.adopt(twin, segmenter)
    progress = Progress(**fields)
    for number, metrics in enumerate(progress.history):
        tracker.log_metrics(metrics, number)
    tracker.set_tags({"copy_of": twin.name})
    print(f"train: {twin.name} is the same model: copied")
    return progress, final


def fit(inputs: Inputs, train: TrainSpec, unit: Unit, scratch: Path,
        on_epoch: Callable[[dict[str, float], int], None]) -> Progress:  # fmt: skip
    """Train from the last checkpoint on; leaves the best epoch's weights in the segmenter.

    Args:
        inputs: of `prepare`.
        train: of the unit.
        unit: names and seeds it.
        scratch: folder of the checkpoint.
        on_epoch: called after each epoch with its metrics and the steps so far, the checkpoint written; may raise.
            Of several processes, in the first one.
    """
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    segmenter, data, volumes, views = inputs.segmenter, inputs.data, inputs.volumes, inputs.views
    rows, rank, size = data.rows(), parallel.rank(), parallel.size()
    steps = len(plan_epoch(rows, train, unit.seed, 0))
    optimiser = _optimiser(segmenter, train)
    scaler = torch.amp.GradScaler(device().type, enabled=train.precision == "fp16")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate_factor(train, steps))
    progress, best = _resume(scratch, segmenter, optimiser, schedule, scaler)
    if not parallel.agree(progress.epoch):
        raise EmadaptError(f"unit {unit.name}: its processes see different checkpoints; {scratch} must be one folder for all")
    shared_norm = size > 1 and any(isinstance(m, BatchNorm) for m in segmenter.modules())
    loss_of = loss_function(train.loss)
    words = TextColumn("{task.fields[words]}")
    with Bar(TextColumn(f"train {unit.name}"), BarColumn(), TimeRemainingColumn(), words, disable=rank > 0) as bar:
        task = bar.add_task("", total=train.epochs * steps, completed=progress.epoch * steps, words="")
        while progress.epoch < train.epochs and not stalled(progress, train):
            started = time.perf_counter()
            # Dropout: the same after a resume, another one in each process.
            torch.manual_seed(digest_seed(unit.seed, progress.epoch, *([rank] if rank else [])))
            losses = []
            segmenter.train()
            plan = plan_epoch(rows, train, unit.seed, progress.epoch)
            own = [deal(data, whole, rank, size) for whole in plan] if size > 1 else plan
            for whole, batch in zip(plan, load_epoch(data, own, train.workers), strict=True):
                groups = with_absent(data, whole, batch) if shared_norm else batch
                losses.append(_step(segmenter, groups, len(whole), loss_of, optimiser, scaler, train))
                schedule.step()
                bar.update(task, advance=1, words=f"loss {losses[-1]:.3f}, val IoU {max(progress.best, 0):.3f}")
            if not math.isfinite(sum(losses)):
                where = f"unit {unit.name}, epoch {progress.epoch}"
                raise EmadaptError(f"{where}: the loss is not finite; lower head_lr or adapter_lr")
            scored = score(segmenter, volumes, views, every=train.val_slices, loss_of=loss_of)
            metrics = {"train/loss": float(np.mean(losses)), "train/lr_head": float(schedule.get_last_lr()[0])}
            metrics |= {"val/iou": scored["iou"], "val/loss": scored["loss"]}
            value = metrics["val/iou"] if train.monitor == "val_iou" else -metrics["val/loss"]
            if value > progress.best:
                progress.best, progress.best_epoch = value, progress.epoch
                best = {k: v.clone() for k, v in segmenter.trained_state().items()}
            progress.epoch += 1
            progress.seconds += time.perf_counter() - started
            progress.history.append(metrics)
            if rank == 0:
                _checkpoint(scratch, progress, segmenter, best, optimiser, schedule, scaler)
                on_epoch(metrics, progress.epoch * steps)
    segmenter.load_trained(best)
    return progress


def _step(segmenter: Segmenter, batch: list[Item], n: int, loss_of: nn.Module, optimiser: torch.optim.Optimizer,
          scaler: torch.amp.GradScaler, train: TrainSpec) -> float:  # fmt: skip
    """One optimiser step over the groups of a batch, or of this process's part of it; `n`: samples of the whole."""
    total = 0.0
    for inputs, labels in batch:
        inputs, labels = inputs.to(device()), labels.to(device())
        with autocast(train.precision):
            # Where only other processes have samples, and normalise over all: no tokens.
            logits = segmenter(inputs if len(labels) else segmenter.no_tokens(inputs), labels.shape[-2:])
        loss = loss_of(logits, labels[:, None]) * (len(labels) / n) if len(labels) else logits.sum()
        scaler.scale(loss).backward()
        total += float(loss.detach())
    parameters = [p for g in optimiser.param_groups for p in g["params"]]
    total = parallel.add_up(parameters, total)
    scaler.unscale_(optimiser)
    torch.nn.utils.clip_grad_norm_(parameters, train.clip)
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
    return total


def val_slices(volume: Volume, every: int) -> list[int]:
    """`every` validation slices spread over the block, or all of them for 0."""
    slices = volume.split["val"]
    if every and len(slices) > every:
        return [slices[round(k)] for k in np.linspace(0, len(slices) - 1, every)]
    return slices


def score(segmenter: Segmenter, volumes: list[Volume], views: list[list[TokenView]], every: int,
           loss_of: nn.Module | None = None) -> dict[str, float]:  # fmt: skip
    """Foreground IoU on validation slices, the mean over the datasets of the union; and the loss if asked."""
    segmenter.eval()
    ious, losses = [], []
    for i, volume in enumerate(volumes):
        slices = val_slices(volume, every)
        overlap = 0.0 if every else None  # quick while training, as in evaluation at the end
        counts = torch.zeros((len(slices), 3), dtype=torch.float64)  # pixels hit, pixels in either, loss
        mine = range(parallel.rank(), len(slices), parallel.size())
        predicted = predict_slices(segmenter, volume, [slices[k] for k in mine], views[i][0] if views else None, overlap)
        for k, (z, probability) in zip(mine, predicted, strict=True):
            label, found = volume.label[z] > 0, probability > 0.5
            counts[k, 0], counts[k, 1] = int((label & found).sum()), int((label | found).sum())
            if loss_of is not None:
                p = torch.tensor(probability).clamp(1e-6, 1 - 1e-6)
                logits = torch.stack([(1 - p).log(), p.log()])[None]  # softmax gives back the probabilities
                counts[k, 2] = float(loss_of(logits, torch.from_numpy(np.array(volume.label[z]))[None, None].long()))
        counts = parallel.total(counts)  # each slice from the one process that has it
        hits, total, _ = counts.sum(0).tolist()
        ious.append(hits / total if total else 1.0)
        if loss_of is not None:
            losses += counts[:, 2].tolist()
    scored = {"iou": float(np.mean(ious)), **{f"iou.{v.name}": iou for v, iou in zip(volumes, ious, strict=True)}}
    return scored | ({"loss": float(np.mean(losses))} if losses else {})


def _optimiser(segmenter: Segmenter, train: TrainSpec) -> torch.optim.Optimizer:
    head = {"params": list(segmenter.head.parameters()), "lr": train.head_lr, "weight_decay": train.weight_decay}
    adapter = parameter_groups(segmenter.backbone, segmenter.regime, train.adapter_lr, train.weight_decay)
    return torch.optim.AdamW([head, *adapter])


def rate_factor(train: TrainSpec, steps: int) -> Callable[[int], float]:
    """Factor on the learning rates at a step: linear warm-up, then cosine to 1 % or constant."""
    total = max(1, train.epochs * steps - train.warmup_steps)

    def factor(step: int) -> float:
        if step < train.warmup_steps:
            return (step + 1) / train.warmup_steps
        if train.schedule == "constant":
            return 1.0
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - train.warmup_steps) / total)))

    return factor


def stalled(progress: Progress, train: TrainSpec) -> bool:
    """Whether patience is over."""
    return bool(train.patience) and progress.epoch - 1 - progress.best_epoch >= train.patience


def digest_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, without the correlation that adding them would bring."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _checkpoint(scratch: Path, progress: Progress, segmenter: Segmenter, best: dict[str, torch.Tensor],
                optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR,
                scaler: torch.amp.GradScaler) -> None:  # fmt: skip
    scratch.mkdir(parents=True, exist_ok=True)
    state = {"progress": vars(progress), "trained": segmenter.trained_state(), "best": best,
             "optimiser": optimiser.state_dict(), "step": schedule.last_epoch, "scaler": scaler.state_dict()}  # fmt: skip
    temporary = scratch / ".checkpoint.part"
    torch.save(state, temporary)
    temporary.replace(scratch / "checkpoint.pt")


def _resume(scratch: Path, segmenter: Segmenter, optimiser: torch.optim.Optimizer,
            schedule: torch.optim.lr_scheduler.LambdaLR,
            scaler: torch.amp.GradScaler) -> tuple[Progress, dict[str, torch.Tensor]]:  # fmt: skip
    path = scratch / "checkpoint.pt"
    if not path.is_file():
        return Progress(), segmenter.trained_state()
    state = torch.load(path, weights_only=True, map_location="cpu")
    segmenter.load_trained(state["trained"])
    optimiser.load_state_dict(state["optimiser"])
    scaler.load_state_dict(state.get("scaler", {}))
    schedule.last_epoch = state["step"]
    for group, rate, factor in zip(optimiser.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * factor(state["step"])
    return Progress(**state["progress"]), state["best"]
