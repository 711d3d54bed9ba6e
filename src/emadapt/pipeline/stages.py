"""Which stages of dvc.yaml are out of date, and what each of them waits for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emadapt.errors import EmadaptError
from emadapt.study.study import Study, Unit

Needs = dict[str, set[str]]
"""Stages that are to run, and for each those of them that have to end first."""

DAMAGED = (
    ", as after a full disk or a crash; delete that file and repeat the command: "
    "DVC finds again what is done"
)
"""About files that DVC does not write whole or not at all."""
PLAN = "plan"
LONGEST_FIRST = ("ingest", "tokens", "train", "diagnose", "evaluate", "report")


def stale_ingests() -> Needs:
    """Stages `ingest` that are out of date; they wait for nothing.

    Raises:
        EmadaptError: DVC cannot read the pipeline, or data/ is not there or not what data.dvc
            records.
    """
    with _repository() as repo:
        names = {stage.addressing for stage in repo.index.graph.nodes}
        ingests = sorted(name for name in names if name.startswith("ingest@"))
        targets = [*ingests, *(["data.dvc"] if "data.dvc" in names else [])]
        stale = set(repo.status(targets=targets))
        if "data.dvc" in stale:
            if not Path("data").exists():
                raise EmadaptError("data: not there; get it with `dvc pull data.dvc`")
            raise EmadaptError(
                "data: not what data.dvc records; keep the change with `dvc add data`, "
                "or put it aside with `mv data data.changed && dvc checkout data.dvc`"
            )
        return {name: set() for name in ingests if name in stale}


def stale_stages(study: Study) -> Needs:
    """All stages that are out of date or need one that is, but for `plan`, which was run.

    Raises:
        EmadaptError: DVC cannot read the pipeline.
    """
    with _repository() as repo:
        stale = set(repo.status()) - {PLAN}
        graph = repo.index.graph
        names = {stage: stage.addressing for stage in graph.nodes if getattr(stage, "cmd", None)}
        needs = {
            name: {names[other] for other in graph.successors(stage) if other in names} - {PLAN}
            for stage, name in names.items()
            if name != PLAN
        }
    for name, others in tokens_first(study).items():
        if name in needs:
            needs[name] |= others
    while more := {name for name, others in needs.items() if others & stale} - stale:
        stale |= more
    frozen = {f"train@{unit.name}" for unit in study.units() if _is_frozen(study, unit)}
    order = sorted(needs.keys() & stale, key=lambda name: (_rank(name, frozen), name))
    return {name: needs[name] & stale for name in order}


def _is_frozen(study: Study, unit: Unit) -> bool:
    return study.regime_settings[unit.regime].on_pretrained_tokens


def _rank(stage: str, frozen: set[str]) -> int:
    """Long stages go first, so that none is left to run alone at the end."""
    kind = stage.partition("@")[0]
    if kind == "train" and stage not in frozen:
        return -1  # the backbone is in the training loop
    return LONGEST_FIRST.index(kind) if kind in LONGEST_FIRST else len(LONGEST_FIRST)


def tokens_first(study: Study) -> Needs:
    """The token caches that units read; these stages go first, so that one alone makes a cache.

    DVC cannot name the caches of a training set, so these are no dependencies in dvc.yaml.
    """
    needs = {}
    for unit in study.units():
        train_set = study.train_set_settings[unit.train_set]
        members = (*train_set.datasets, *study.unlabelled_of(unit))
        needs[f"train@{unit.name}"] = {f"tokens@{unit.backbone}-{name}" for name in members}
        every = {f"tokens@{unit.backbone}-{name}" for name in study.datasets}
        needs[f"evaluate@{unit.name}"] = every
        needs[f"diagnose@{unit.backbone}-{unit.regime}"] = every
    return needs


@contextmanager
def _repository() -> Iterator[Any]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.rwlock import RWLockFileCorruptedError

    try:
        with Repo() as repo:
            yield repo
    except DvcException as error:
        damaged = "dvc.lock" in str(error) or isinstance(error, RWLockFileCorruptedError)
        raise EmadaptError(f"dvc: {error}{DAMAGED if damaged else ''}") from error
