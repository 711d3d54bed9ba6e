"""Compare a run with what MLflow has of it, and send the rest. All of it may raise or wait."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from emadapt.files import file_md5
from emadapt.tracking import views
from emadapt.tracking.provenance import EXPERIMENT
from emadapt.tracking.redact import redact, said_by
from emadapt.tracking.run import MODEL, Model, Run, flat, now, settings_digest, texts
from emadapt.tracking.store import PATIENCE, experiment_of, find, within

log = logging.getLogger(__name__)

KEY = "mlflow.emadapt.key"
"""Tag with a run's key. MLflow's page hides tags that begin like this."""
ARTIFACT = "mlflow.emadapt.artifact."
"""Begins a tag with the md5 of an artifact."""
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"}
"""What MLflow answers when it will never take something; everything else is an outage."""
REPLACED = "replaced"
"""Tag of a run: the id of a later run of the same unit, or `no`."""


@dataclass
class Known:
    """What MLflow has of a run."""

    run_id: str
    experiment_id: str
    model_id: str  # empty: none
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    unread: set[str]  # names of metrics whose values were not read yet
    datasets: set[tuple[str, str, str]]  # name, digest and context of each
    metrics: dict[tuple[str, int], float] = field(default_factory=dict)  # by name and step


def update(store: Any, run: Run) -> None:
    """Compare a run with what MLflow has, and send the rest."""
    if run.known is None:
        run.known = within(PATIENCE, lambda: _find_or_create(store, run))
    for send in SENDERS:
        send(store, run, run.known)


def _find_or_create(store: Any, run: Run) -> Known:
    """The run with this key, else one with the same values of the tags `run.same`, else new."""
    experiment = experiment_of(store, run.root, run.study)
    tags = texts(run.tags)
    wanted = {name: tags.get(name, "") for name in run.same}
    found = find(store, experiment, {KEY: run.key})
    if not found and wanted and all(wanted.values()):
        found = find(store, experiment, wanted)
    own = {"settings": settings_digest(run.params)} if run.params else {}
    if run.parent and (parent := find(store, experiment, texts(run.parent))):
        own["mlflow.parentRunId"] = parent.info.run_id
    run.tags = own | run.tags
    if not found:
        ours = {"origin": run.origin, KEY: run.key, REPLACED: "no"}
        tags = {**views.source_tags(tags), **own, **tags, **ours}
        found = store.create_run(experiment, run.began, tags, run.name)
    inputs = found.inputs.dataset_inputs if found.inputs else []
    outputs = found.outputs.model_outputs if found.outputs else []
    return Known(
        run_id=found.info.run_id,
        experiment_id=experiment,
        model_id=outputs[0].model_id if outputs else "",
        status=found.info.status,
        tags=dict(found.data.tags),
        params=dict(found.data.params),
        unread=set(found.data.metrics),
        datasets={
            (one.dataset.name, one.dataset.digest, tag.value) for one in inputs for tag in one.tags
        },
    )


def _send_texts(store: Any, run: Run, known: Known) -> None:
    from mlflow.entities import Param, RunTag

    params = {k: v for k, v in texts(flat(run.params)).items() if k not in known.params}
    tags = {name: text for name, text in texts(run.tags).items() if name not in known.tags}
    results = texts(run.results)
    tags |= {name: text for name, text in results.items() if known.tags.get(name) != text}
    _send_batches(store, run, known, "params", [Param(*item) for item in params.items()], 100)
    _send_batches(store, run, known, "tags", [RunTag(*item) for item in tags.items()], 100)
    known.params |= params
    known.tags |= tags


def _send_model(store: Any, run: Run, known: Known) -> None:
    """Make the run's model in MLflow: tags, names, and how it is opened. Its files come later.

    One that is not yet among the run's outputs is of a process that died here.
    """
    from mlflow.entities import LoggedModelOutput

    if run.model is None or known.model_id:
        return
    where = f"source_run_id = '{known.run_id}'"
    made = within(PATIENCE, partial(store.search_logged_models, [known.experiment_id], where))
    if not made:
        # The run has all settings; as columns of the page's table of models they would be too many.
        own = {"tags": texts(run.tags), "params": texts(run.params.get("unit", {}))}
        create = partial(store.create_logged_model, known.experiment_id, MODEL, known.run_id, **own)
        made = [within(PATIENCE, create)]
    known.model_id = made[0].model_id
    with tempfile.TemporaryDirectory() as folder:
        file = write_mlmodel(Path(folder), run.model, known.run_id, known.model_id)
        within(PATIENCE, partial(store.log_model_artifact, known.model_id, str(file)))
    output = LoggedModelOutput(known.model_id, 0)
    within(PATIENCE, partial(store.log_outputs, known.run_id, [output]))


def write_mlmodel(folder: Path, model: Model, run_id: str, model_id: str) -> Path:
    """Write the file that makes a folder one of MLflow's models: a loader and a signature."""
    import mlflow
    import numpy as np
    from mlflow.pyfunc import add_to_model
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    grey, probability = (
        Schema([TensorSpec(np.dtype(name), (-1, -1, -1))]) for name in ("uint8", "float32")
    )  # Z, Y, X
    params = ParamSchema([ParamSpec("voxel_nm", "double", model.voxel_nm, (-1,))])
    signature = mlflow.models.ModelSignature(grey, probability, params)
    described = mlflow.models.Model(run_id=run_id, model_id=model_id, signature=signature)
    add_to_model(described, loader_module=model.loader)
    described.save(str(folder / "MLmodel"))
    return folder / "MLmodel"


def _send_metrics(store: Any, run: Run, known: Known) -> None:
    own = {name for values in run.metrics.values() for name in values}
    for name in own & known.unread:
        history = within(PATIENCE, partial(store.get_metric_history, known.run_id, name))
        for metric in sorted(history, key=lambda metric: metric.timestamp):
            known.metrics[name, metric.step] = metric.value
    known.unread -= own
    new = {
        (name, step): value
        for step, values in run.metrics.items()
        for name, value in values.items()
        if known.metrics.get((name, step)) != value
    }
    metrics = [_metric(run, known, name, step, value) for (name, step), value in new.items()]
    _send_batches(store, run, known, "metrics", metrics, 1000)
    known.metrics |= new


def _metric(run: Run, known: Known, name: str, step: int, value: float) -> Any:
    from mlflow.entities import Metric

    of: dict[str, str] = {}
    if known.model_id and step == 0:
        of["model_id"] = known.model_id
        if on := next((one for one in run.datasets if name.endswith(f".{one.name}")), None):
            of |= {"dataset_name": on.name, "dataset_digest": on.digest}
    return Metric(name, value, run.times.get(step, now()), step, **of)


def _send_datasets(store: Any, run: Run, known: Known) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    for one in run.datasets:
        mark = (one.name, one.digest, one.context)
        if mark in known.datasets:
            continue
        source = json.dumps({"uri": redact(one.source)})
        dataset = Dataset(one.name, one.digest, "local", source)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", one.context)])]
        _attempt(run, "datasets", partial(store.log_inputs, known.run_id, datasets=inputs))
        known.datasets.add(mark)


def _send_artifacts(store: Any, run: Run, known: Known) -> None:
    from mlflow.entities import RunTag

    sent: dict[str, str] = {}
    for name, path in run.artifacts.items():
        digest = run.digests.get(name, "")
        if digest and known.tags.get(ARTIFACT + name) == digest:
            continue
        if not path.is_file() or (digest and file_md5(path) != digest):
            log.warning("tracking: %s: %s is gone or has changed: not logged", run.name, path)
            continue
        patience = PATIENCE + path.stat().st_size / 1e6  # at least 1 MB/s
        folder = str(Path(name).parent)
        send = partial(store.log_artifact, known.run_id, str(path), folder.strip("."))
        if folder == MODEL and known.model_id:
            send = partial(store.log_model_artifact, known.model_id, str(path))
        if _attempt(run, name, send, patience):
            sent[ARTIFACT + name] = digest
    if known.model_id and any(name.startswith(f"{ARTIFACT}{MODEL}/") for name in sent):
        within(PATIENCE, partial(store.finalize_logged_model, known.model_id, "READY"))
    tags = [RunTag(*item) for item in sent.items()]
    _send_batches(store, run, known, "tags", tags, 100)
    known.tags |= sent


def _send_status(store: Any, run: Run, known: Known) -> None:
    """Set the status. A run that has ended stays as it ended, unless it is at work again."""
    if "error" in known.tags and run.status in ("RUNNING", "FINISHED"):  # of an earlier end
        within(PATIENCE, partial(store.delete_tag, known.run_id, "error"))
        del known.tags["error"]
    if run.status == "RUNNING":
        if known.status != "RUNNING":
            within(PATIENCE, partial(store.update_run, known.run_id, status="RUNNING"))
    else:
        if known.status == "RUNNING":
            ended = run.ended or now()
            within(PATIENCE, partial(store.set_terminated, known.run_id, run.status, ended))
        within(PATIENCE, partial(views.describe, views.refresh_run, store, known.run_id))
    known.status = run.status


def replace_others(store: Any, known: Known) -> None:
    """Mark other runs of the unit, in the same experiment of DVC, as replaced by this one."""
    where = f"tags.unit = {json.dumps(known.tags['unit'])} and tags.{REPLACED} = 'no'"
    for other in store.search_runs([known.experiment_id], where):
        same = other.data.tags.get(EXPERIMENT) == known.tags.get(EXPERIMENT)
        if same and other.info.run_id != known.run_id:
            store.set_tag(other.info.run_id, REPLACED, known.run_id)
    if known.tags.get(REPLACED) != "no":  # an earlier version of the unit is back
        store.set_tag(known.run_id, REPLACED, "no")
        known.tags[REPLACED] = "no"


def _attempt(run: Run, what: str, call: Callable[[], Any], patience: float = PATIENCE) -> bool:
    """Call the store. What it refuses is reported and skipped."""
    from mlflow.exceptions import MlflowException

    try:
        within(patience, call)
    except MlflowException as error:
        if error.error_code not in REFUSALS:
            raise
        log.warning("tracking: %s: MLflow refuses %s: %s", run.name, what, said_by(error))
        return False
    return True


def _send_batches(
    store: Any, run: Run, known: Known, what: str, items: list[Any], limit: int
) -> None:
    """Send params, tags or metrics, at most MLflow's `limit` in a call."""
    for start in range(0, len(items), limit):
        batch = {what: items[start : start + limit]}
        _attempt(run, what, partial(store.log_batch, known.run_id, **batch))


SENDERS = (_send_texts, _send_model, _send_datasets, _send_metrics, _send_artifacts, _send_status)
"""In this order: metrics name the model and its datasets."""
