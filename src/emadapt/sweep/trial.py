"""Run claimed trials: train, report each epoch, prune, tell. The test set is never looked at."""

from __future__ import annotations

import contextlib
import gc
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from optuna.trial import Trial

from emadapt.data.crops import plan_epoch
from emadapt.models.heads import needs_image
from emadapt.study.study import Study
from emadapt.sweep.claims import beat, end, root_number
from emadapt.sweep.fit_stacked import Member, fit_stacked
from emadapt.sweep.space import Target, study_at
from emadapt.sweep.storage import FOLDER, HEARTBEAT, STORAGE_ERRORS, Store
from emadapt.tracking import tracker as tracking
from emadapt.training.fit import Inputs, fit, score
from emadapt.training.train import prepare, unit_key, unit_tags


@dataclass(frozen=True)
class Sweep:
    """What the trials of a sweep share.

    Attributes:
        study: Optuna's.
        store: where it is kept.
        config: the study in params.yaml.
        target: what is swept.
    """

    study: optuna.Study
    store: Store
    config: Study
    target: Target


class Attempt:
    """One claimed trial at work.

    Attributes:
        config, unit: what it trains.
        folder: of its checkpoint; the same when it is run again.
        told: its end is in the storage.
    """

    def __init__(self, sweep: Sweep, trial: Trial) -> None:
        self.sweep, self.trial = sweep, trial
        self.config, self.unit = study_at(sweep.config, sweep.target, trial.params)
        self.train = self.config.train_settings(self.unit)
        self.root = root_number(sweep.study.get_trials(deepcopy=False)[trial.number])
        self.folder = FOLDER / sweep.study.study_name / f"trial-{self.root}"
        self.tracker: tracking.Tracker = tracking.NullTracker()
        self.steps, self.told = 1, False

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Its run in the lab book, under the sweep's; the one that is there when the trial is run again."""
        study = self.sweep.study
        name = study.study_name
        tags = {
            **unit_tags(self.config, self.unit, "sweep"),
            "unit": f"{name[:-9]}-trial-{self.root}",
            "sweep": name,
            "trial": str(self.root),
            "sweep.trial": f"{name}/{self.root}",
        }
        params = {**self.config.describe(self.unit), "sweep": self.trial.params}
        again = ("sweep.trial",) if self.root != self.trial.number else ()
        parent = study.user_attrs.get("mlflow.parent") or None
        with tracking.open_run(
            Path(), self.config.name, tags, params, resume_by=again, parent=parent
        ) as self.tracker:
            yield

    def begin(self, inputs: Inputs) -> Path:
        """Take note of the epoch's length; the folder for the checkpoint."""
        self.steps = len(plan_epoch(inputs.data.rows(), self.train, self.unit.seed, 0))
        return self.folder / unit_key(self.config, self.unit, inputs)

    def on_epoch(self, metrics: dict[str, float], step: int) -> None:
        """Report the validation IoU; end the trial here if it is not worth going on.

        Raises:
            optuna.TrialPruned: it is not, and that is told already.
        """
        self.tracker.log_metrics(metrics, step)
        epoch = step // self.steps
        self.trial.report(metrics["val/iou"], epoch)
        if epoch < self.train.epochs and self.trial.should_prune():
            self.finish()
            raise optuna.TrialPruned

    def finish(self, scored: dict[str, float] | None = None, failed: str = "") -> None:
        """Tell how it ended (scored, failed for a reason, or else pruned), once.

        The lab book first: killed between the two, the trial is run again and its run gone on with.
        """
        if self.told:
            return
        state = "failed" if failed else "finished" if scored else "pruned"
        self.tracker.log_metrics({f"val/best_{k}": v for k, v in (scored or {}).items()})
        self.tracker.set_tags({"state": state, "error": failed or None})
        self.tracker.end({"failed": "FAILED", "finished": "FINISHED", "pruned": "KILLED"}[state])
        self.told = True
        value = scored["iou"] if scored else None
        mine = end(self.sweep.study, self.sweep.store, self.trial, value=value, failed=failed)
        words = failed or ("" if value is None else f"validation IoU {value:.4f}")
        print(
            f"trial {self.trial.number}: {state if mine else 'taken over by another worker'} {words}",
            flush=True,
        )
        if mine:
            shutil.rmtree(self.folder, ignore_errors=True)


def run_trials(sweep: Sweep, trials: list[Trial]) -> None:
    """Run claimed trials, heads on cached tokens together, all else one after the other.

    Raises:
        optuna.exceptions.StorageInternalError: the storage is gone; the trials are taken back by whoever notices.
        torch.AcceleratorError: the GPU failed, other than by being full; the worker ends, and another one runs its trials.
    """
    attempts = [Attempt(sweep, trial) for trial in trials]
    with _beating(sweep.store, trials):
        while attempts:
            first = attempts[0]
            stack = sweep.config.sweep.stack > 1 and _fits_a_stack(first)
            together = [a for a in attempts if _stackable(a, first)] if stack else [first]
            attempts = [a for a in attempts if a not in together]
            with contextlib.ExitStack() as runs:
                for attempt in together:
                    runs.enter_context(attempt.run())
                try:
                    _run_stack(together) if stack else _run_one(first)
                except optuna.TrialPruned:
                    pass
                except (
                    *STORAGE_ERRORS,
                    torch.AcceleratorError,
                ):  # after its errors a GPU is of no use to this process
                    raise
                except Exception as error:
                    for attempt in together:
                        attempt.finish(failed=_reason(error))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what an out-of-memory trial held is the next one's


def _fits_a_stack(attempt: Attempt) -> bool:
    """Its head sees cached tokens and nothing else; nothing that `fit`, `score` and `Segmenter` alone have.

    Those are a scaled loss, averaged weights, means over slices or mirror images, and patches that overlap.
    """
    config, unit, train = attempt.config, attempt.unit, attempt.train
    frozen, spec = (
        config.regime_settings[unit.regime].kind == "frozen",
        config.backbone_settings[unit.backbone],
    )
    alone = (
        train.precision == "fp16"
        or train.average
        or needs_image(train.head)
        or config.train_set_settings[unit.train_set].crops
    )
    return frozen and train.cached and not (alone or spec.smooth_z_nm or spec.flips or spec.stride)


def _stackable(one: Attempt, other: Attempt) -> bool:
    """They see the same tokens through the same kind of head."""
    specs = [a.config.backbone_settings[a.unit.backbone] for a in (one, other)]
    return specs[0] == specs[1] and one.train.head == other.train.head


def _run_one(attempt: Attempt) -> None:
    inputs = prepare(attempt.config, attempt.unit)
    fit(inputs, attempt.train, attempt.unit, attempt.begin(inputs), attempt.on_epoch)
    attempt.finish(score(inputs.segmenter, inputs.volumes, inputs.views, every=0))


def _run_stack(attempts: list[Attempt]) -> None:
    inputs = prepare(attempts[0].config, attempts[0].unit)
    seed = attempts[0].unit.seed
    members = [Member(a.train, seed, a.begin(inputs), a.on_epoch) for a in attempts]
    fit_stacked(inputs, members, seed)
    for attempt, member in zip(attempts, members, strict=True):
        if isinstance(member.error, STORAGE_ERRORS):
            raise member.error
        attempt.finish(member.scored or None, failed=_reason(member.error) if member.error else "")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError):
        return f"CUDA out of memory; smaller `train.batch` or `sweep.stack` needs less ({text})"
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _beating(store: Store, trials: list[Trial]) -> Iterator[None]:
    """Say every few seconds that these trials live, where the storage asks for it."""
    over = threading.Event()

    def say() -> None:
        while not over.wait(HEARTBEAT):
            for trial in trials:
                with contextlib.suppress(*STORAGE_ERRORS):  # the database may come back
                    beat(store, trial)

    thread = threading.Thread(target=say, daemon=True)
    if store.shared:
        thread.start()
    try:
        yield
    finally:
        over.set()
