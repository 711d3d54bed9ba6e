"""What a person sees of a study in MLflow's own pages: descriptions, named views of the runs table, the source of a run.

All of it is tags of the experiment and its runs. MLflow's page reads some of them in formats that are not documented (these
are of 3.17.2); a server that does not know them shows its plain table instead. Means over seeds are a view that groups runs, not
parent runs: nobody has to write them, so units that end side by side, or reach MLflow after an outage, cannot leave them wrong.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

TEST_IOU = "test/iou."
NOTE = "mlflow.note.content"
VIEW = "mlflow.sharedViewState."
# A tag for every text that emadapt wrote, named by its digest: how it knows its own. One tag with a list would lose entries when
# units end side by side. MLflow's page hides tags that begin like this.
WRITTEN = "mlflow.emadapt.written."
# Older pages choose between their two sets of menus by this. The one of 3.17 goes by its own switch, top left, or by the address.
KIND = {"mlflow.experimentKind": "custom_model_development"}

DESCRIPTION = """Study {study}: one run per model{tested}. {links}

Menus about traces and judges? Choose **Model training**, top left. The views linked above are also under **Views**, top right;
**Curves** shows IoU and validation loss, and the other metrics once its search box is cleared.

A **run** is a unit = backbone x regime x training set x seed. `train` opens it, `evaluate` adds test metrics and overlays.
The tag `origin: restored` marks a model that DVC took from its cache: test metrics, no curves.{means}

**Metrics**
- `test/iou.<dataset>`: **the result**, foreground IoU pooled over all test slices of a dataset at its own resolution
- `test/dice.<dataset>`, `test/boundary_iou.<dataset>`: Dice; IoU of the bands inside the boundaries
- `test/iou_tuned.<dataset>`: IoU at the threshold that validation slices chose; all other test metrics are at 0.5
- `test/ap50.<dataset>`, `test/pq.<dataset>`: of objects, average precision at IoU above 0.5; panoptic quality
- `val/iou`, `val/loss`: on validation slices, after each epoch; the best epoch is kept
- `val/best_iou`, `val/best_iou.<dataset>`: of the model that was kept, on all validation slices
- `train/loss`, `train/lr_head`: after each epoch, counted in optimiser steps
- `ridge/strength`, `knn/k`, with `threshold` and `val/iou`: what these two regimes chose from, a step for each candidate
- `domain/frechet.<a>__<b>`: Fréchet distance between the tokens of two datasets, larger is further apart; the other
  `domain/...` metrics: docs/diagnostics.md

**Artifacts**: `overlays/` (image, label, prediction, errors), `metrics.json` (95 % intervals, slices), `model/`, `domain/`

**Filters** to paste into the search box
{filters}

emadapt keeps this text and its views up to date as long as nobody edits them.
"""
MEANS = """

**Means over seeds** groups the runs whose settings and data differ in nothing but the seed. Standard deviations and intervals
are in `reports/`."""


def source_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags that fill "Source" on the page of a run with these tags: the command and the commit."""
    source = {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": f"emadapt {tags.get('stage', '')}".strip(),
    }
    return source | (
        {"mlflow.source.git.commit": tags["git.commit"]} if "git.commit" in tags else {}
    )


def refresh_run(store: Any, run_id: str) -> None:
    """Describes a run that has ended, in a line; one with test metrics brings the page of its experiment up to date."""
    from mlflow.entities import RunTag

    run = store.get_run(run_id)
    if {"backbone", "regime", "train_set", "seed"} <= run.data.tags.keys():
        tags = _changes(run.data.tags, {NOTE: run_line(run)})
        store.log_batch(run_id, tags=[RunTag(name, text) for name, text in tags.items()])
    if datasets := _tested(run.data.metrics):
        other = f"tags.seed != {json.dumps(run.data.tags.get('seed', ''))}"
        several = bool(store.search_runs([run.info.experiment_id], other, max_results=1))
        refresh_experiment(store, run.info.experiment_id, datasets, several)


def refresh_experiment(
    store: Any, experiment_id: str, datasets: Sequence[str] = (), several_seeds: bool = False
) -> None:
    """Writes the description and the views of a study; what somebody edited there stays as it is."""
    experiment = store.get_experiment(experiment_id)
    wanted = page(experiment.name, experiment_id, datasets, several_seeds)
    for name, text in _changes(experiment.tags, wanted).items():
        store.set_experiment_tag(experiment_id, name, text)


def run_line(run: Any) -> str:
    """One line on a run: what was trained on what, and how good it is. With numbers of slices where tags `n.*` tell them."""
    tags, metrics = run.data.tags, run.data.metrics

    def slices(name: str, text: str) -> str:
        return text.format(tags[name]) if name in tags else ""

    data = f"{slices('n.train', '{} slices of ')}{tags['train_set']}"
    line = f"{tags['backbone']}, {tags['regime']}, trained on {data}, seed {tags['seed']}."
    if "val/best_iou" in metrics:
        line += f" Validation IoU {metrics['val/best_iou']:.3f}."
    tested = [
        f"{metrics[TEST_IOU + d]:.3f} on {d}{slices(f'n.test.{d}', ' ({} slices)')}"
        for d in _tested(metrics)
    ]
    if tested:
        line += f" Test IoU {', '.join(tested)}."
    return line + (
        f" Stopped by {tags['error']}" if run.info.status == "FAILED" and "error" in tags else ""
    )


def page(
    study: str, experiment_id: str, datasets: Sequence[str], several_seeds: bool
) -> dict[str, str]:
    """The tags that make up the page of a study.

    Args:
        study: the experiment's name.
        experiment_id: for links.
        datasets: those that models are tested on, none if that is not known yet.
        several_seeds: adds a view of means over seeds.
    """
    names = {"test-iou": "Test IoU"} | ({"over-seeds": "Means over seeds"} if several_seeds else {})
    # The address chooses the menus too: a browser that sees MLflow for the first time shows those for chat applications.
    runs = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey="
    links = [f"[{name}]({runs}{key})" for key, name in names.items()] + [
        f"[Curves]({runs}test-iou&compareRunsMode=CHART)"
    ]
    filters = "\n".join(
        f"- `` {text} ``: {meaning}" for text, meaning in suggested_filters(datasets).items()
    )
    tested = f", tested on {', '.join(datasets)}" if datasets else ""
    means = MEANS if several_seeds else ""
    note = DESCRIPTION.format(
        study=study, tested=tested, links=" · ".join(links), means=means, filters=filters
    )
    views = {}
    for rank, (key, name) in enumerate(
        reversed(names.items())
    ):  # the list under Views shows the latest first
        state = json.dumps(_view(datasets, grouped=key == "over-seeds"))
        views[VIEW + key] = json.dumps({"name": name, "createdAt": rank, "state": state})
    return {NOTE: note, **views}


def suggested_filters(datasets: Sequence[str]) -> dict[str, str]:
    """Filters for MLflow's search box, and what each one finds."""
    return {
        'tags.regime = "lora"': "one regime",
        'tags.backbone = "dinov2_s" and tags.train_set = "paired"': "one backbone and training set",
        'tags.unit LIKE "%-frozen-%"': "part of a run's name",
        **{f"metrics.`{TEST_IOU}{name}` > 0.8": f"good on {name}" for name in datasets},
        'tags.seed = "0"': "one seed",
        'attributes.status != "FINISHED"': "running, failed or killed",
        'tags.origin = "restored"': "models from DVC's cache",
        'tags.`git.dirty` = "false"': "only committed code",
    }


def _view(datasets: Sequence[str], grouped: bool) -> dict[str, Any]:
    """The state of the runs table that a named view brings back: columns with their widths, sorting, groups, which charts."""
    iou = [f"metrics.`{TEST_IOU}{name}`" for name in datasets]
    widths = {"attributes.`Run Name`": 470 if grouped else 260} | {
        name: 6 * len(name) for name in iou
    }
    widths["metrics.`val/best_iou`"] = 110
    if not grouped:
        widths |= {"tags.`train_set`": 120, "tags.`regime`": 80, "tags.`backbone`": 100}
    state: dict[str, Any] = {
        "selectedColumns": list(widths)[1:],
        "columnOrder": list(widths),
        "columnWidths": widths,
    }
    if iou:
        state |= {"orderByKey": iou[0], "orderByAsc": False}
    if grouped:
        keys = [
            {"mode": "tag", "groupByData": tag}
            for tag in ("train_set", "regime", "backbone", "settings", "data.md5")
        ]
        state["groupBy"] = {"aggregateFunction": "average", "groupByKeys": keys}
    return {
        **state,
        "chartsSearchFilter": "/iou|val/loss|domain/frechet[.]",
        "runsHiddenMode": "FIRST_20_RUNS",
    }


def _tested(metrics: Mapping[str, float]) -> list[str]:
    return sorted(name.removeprefix(TEST_IOU) for name in metrics if name.startswith(TEST_IOU))


def _changes(now: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Which tags to set, in this order: those wanted that are not there, or are still as emadapt wrote them, and their marks."""
    changes: dict[str, str] = {}
    for name, text in wanted.items():
        if name not in now or (now[name] != text and WRITTEN + _digest(now[name]) in now):
            changes |= {WRITTEN + _digest(text): name, name: text}
    return changes


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
