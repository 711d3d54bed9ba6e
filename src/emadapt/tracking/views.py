"""What a person sees of a study in MLflow: descriptions, named views of the table, a run's source.

All of it is tags of the experiment and its runs. MLflow's page reads some of them in formats that
are not documented (these are of 3.17.2); a server that does not know them shows its plain table.
Means over seeds are a view that groups runs, so nobody has to write them and keep them right.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emadapt.tracking.redact import said_by

log = logging.getLogger(__name__)

HEADLINES = {"test/iou.": "IoU", "test/auroc.": "AUROC"}
"""Metrics on test datasets by which models are ranked: what their names begin with, in words."""
NOTE = "mlflow.note.content"
VIEW = "mlflow.sharedViewState."
CURRENT = 'tags.replaced = "no" and tags.stage != "sweep"'
"""What the saved views show: of each unit the latest run, and no trials of sweeps."""
WRITTEN = "mlflow.emadapt.written."
"""Begins a tag for every text that emadapt wrote, named by its digest: how it knows its own."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""By this, pages older than 3.17 choose between their two sets of menus."""

DESCRIPTION = """Study {study}: one run for each model{tested}. {links}

Menus about traces and judges? Choose **Model training**, top left. The views are also under
**Views**, top right. **Curves** shows IoU and validation loss; clear its search box for the others.

A **run** is a unit: backbone, regime, training set and seed. A later run of the same unit hides the
earlier ones from these views: their tag `replaced` has its id. The tag `origin: restored` marks a
model from DVC's cache.{means}

**Metrics**
- `test/iou.<dataset>`: **the result**, foreground IoU pooled over all test slices of a dataset
- `test/iou.<dataset>.<class>`: of each of several classes; `test/iou.<dataset>` is their mean
- `test/auroc.<dataset>`, `test/accuracy.<dataset>`, ...: of whole images; `val/auroc` for `val/iou`
- `test/dice.<dataset>`, `test/boundary_iou.<dataset>`: Dice; IoU of bands along the boundaries
- `test/ap50.<dataset>`, `test/pq.<dataset>`: of objects: AP at IoU 0.5; panoptic quality
- `val/iou`, `val/loss`, `train/loss`, `train/lr_head`, `train/lr_adapter`: after each epoch
- `val/best_iou`, `val/best_iou.<dataset>`: of the best epoch, on all validation slices
- `ridge/strength`, `knn/k`, `val/iou`: candidates that these regimes chose from, a step each
- `domain/frechet.<a>__<b>`: distance between the tokens of two datasets; larger is further apart

- `seconds`, `peak_mb`, `trainable_params`: what training took

**Models**: the tab of that name; `mlflow.pyfunc.load_model("runs:/RUN/model")` opens one.

**Artifacts**: `overlays/`, `metrics.json` (95 % intervals, slices), `model/`, `domain/`

**Search box**, for example: `tags.regime = "lora" and metrics.`val/best_iou` > 0.8`

emadapt keeps this text and its views up to date as long as nobody edits them.
"""
MEANS = """

**Means over seeds** groups the runs whose settings and data differ in nothing but the seed.
Standard deviations and intervals are in `reports/`."""


def describe(refresh: Callable[[Any, str], None], store: Any, which: str) -> None:
    """Bring a description up to date. A failure is reported and stops nothing."""
    try:
        refresh(store, which)
    except Exception as error:
        log.warning("tracking: the description of %s is not up to date: %s", which, said_by(error))


def source_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags that fill "Source" on a run's page: the command and the commit."""
    command = f"emadapt {tags.get('stage', '')}".strip()
    source = {"mlflow.source.type": "LOCAL", "mlflow.source.name": command}
    if "git.commit" in tags:
        source["mlflow.source.git.commit"] = tags["git.commit"]
    return source


def refresh_run(store: Any, run_id: str) -> None:
    """Describe a run in a line; a run with test metrics brings its study's page up to date."""
    from mlflow.entities import RunTag

    run = store.get_run(run_id)
    if {"backbone", "regime", "train_set", "seed"} <= run.data.tags.keys():
        tags = _changes(run.data.tags, {NOTE: run_line(run)})
        store.log_batch(run_id, tags=[RunTag(name, text) for name, text in tags.items()])
    if tested := _tested(run.data.metrics):
        other = f"tags.seed != {json.dumps(run.data.tags.get('seed', ''))}"
        several = bool(store.search_runs([run.info.experiment_id], other, max_results=1))
        refresh_experiment(store, run.info.experiment_id, tested, several)


def refresh_experiment(
    store: Any, experiment_id: str, tested: Sequence[str] = (), several_seeds: bool = False
) -> None:
    """Write the description and the views of a study; what somebody edited there stays."""
    experiment = store.get_experiment(experiment_id)
    wanted = page(experiment.name, experiment_id, tested, several_seeds)
    for name, text in _changes(experiment.tags, wanted).items():
        store.set_experiment_tag(experiment_id, name, text)


def run_line(run: Any) -> str:
    """What was trained on what, and how good it is."""
    tags, metrics = run.data.tags, run.data.metrics
    unit = f"{tags['backbone']}, {tags['regime']}, trained on {tags['train_set']}"
    parts = [f"{unit}, seed {tags['seed']}."]
    for name, said in (("val/best_iou", "IoU"), ("val/best_auroc", "AUROC")):
        if name in metrics:
            parts.append(f"Validation {said} {metrics[name]:.3f}.")
    for begin, said in HEADLINES.items():
        if own := [name for name in _tested(metrics) if name.startswith(begin)]:
            tested = ", ".join(f"{metrics[name]:.3f} on {_dataset(name)}" for name in own)
            parts.append(f"Test {said} {tested}.")
    if run.info.status == "FAILED" and "error" in tags:
        parts.append(f"Stopped by {tags['error']}")
    return " ".join(parts)


def page(
    study: str, experiment_id: str, tested: Sequence[str], several_seeds: bool
) -> dict[str, str]:
    """The tags that make up the page of a study; `tested` are metrics that `HEADLINES` begin."""
    own = (said for begin, said in HEADLINES.items() if any(n.startswith(begin) for n in tested))
    names = {"test-iou": f"Test {next(own, 'IoU')}"}
    if several_seeds:
        names["over-seeds"] = "Means over seeds"
    # A browser that sees MLflow for the first time shows menus for chat applications otherwise.
    runs = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey="
    links = [f"[{name}]({runs}{key})" for key, name in names.items()]
    links.append(f"[Curves]({runs}test-iou&compareRunsMode=CHART)")
    note = DESCRIPTION.format(
        study=study,
        tested=f", tested on {', '.join(map(_dataset, tested))}" if tested else "",
        links=" · ".join(links),
        means=MEANS if several_seeds else "",
    )
    tags = {NOTE: note}
    # The list under Views shows the latest first.
    for rank, (key, name) in enumerate(reversed(names.items())):
        state = json.dumps(_view(tested, grouped=key == "over-seeds"))
        tags[VIEW + key] = json.dumps({"name": name, "createdAt": rank, "state": state})
    return tags


def _view(tested: Sequence[str], grouped: bool) -> dict[str, Any]:
    """The state of the runs table in a named view: columns and widths, order, groups, charts."""
    scores = [f"metrics.`{name}`" for name in tested]
    widths = {"attributes.`Run Name`": 470 if grouped else 260}
    widths |= {name: 6 * len(name) for name in scores}
    widths["metrics.`val/best_iou`"] = 110
    if not grouped:
        widths |= {"tags.`train_set`": 120, "tags.`regime`": 80, "tags.`backbone`": 100}
    state: dict[str, Any] = {
        "selectedColumns": list(widths)[1:],
        "columnOrder": list(widths),
        "columnWidths": widths,
        "chartsSearchFilter": "/iou|/auroc|val/loss|domain/frechet[.]",
        "searchFilter": CURRENT,
        "runsHiddenMode": "FIRST_20_RUNS",
    }
    if scores:
        state |= {"orderByKey": scores[0], "orderByAsc": False}
    if grouped:
        groups = ("train_set", "regime", "backbone", "settings", "data.md5")
        keys = [{"mode": "tag", "groupByData": tag} for tag in groups]
        state["groupBy"] = {"aggregateFunction": "average", "groupByKeys": keys}
    return state


def _tested(metrics: Mapping[str, float]) -> list[str]:
    return sorted(name for name in metrics if name.startswith(tuple(HEADLINES)))


def _dataset(metric: str) -> str:
    return metric.partition(".")[2]


def _changes(now: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Which tags to set: those that are missing, or still as emadapt wrote them; and their marks.

    A tag a text: one tag with a list would lose entries when units end at the same time.
    """
    changes: dict[str, str] = {}
    for name, text in wanted.items():
        if name not in now or (now[name] != text and WRITTEN + _digest(now[name]) in now):
            changes |= {WRITTEN + _digest(text): name, name: text}
    return changes


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
